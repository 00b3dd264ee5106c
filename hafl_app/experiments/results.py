"""Results of a comparison: the curves of its runs, and one row a method."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from hafl_app.experiments.paired import Paired
from hafl_app.metrics import ACCURACY, Metric, task_of

MEGABYTE = 1e6


@dataclass(frozen=True)
class Curve:
    """Curve of a run from round 0: values of `metric` (NaN if unknown), and bytes so far.

    Unless ``federation.test_every=1``, `test` is known of the last and the best round at least.
    `failures` counts the trainings, of all rounds, that did not count; `chosen_round` is the best
    as the run chose it, if it did. `at_rank` is the test score of the last round's adapter cut to
    the rank of a device, by rank, as far as it was measured; `client_seconds` and `server_seconds`
    are CPU seconds of all rounds, NaN if unknown.
    """

    test: tuple[float, ...]
    validation: tuple[float, ...]
    bytes_down: tuple[int, ...]
    bytes_up: tuple[int, ...]
    failures: int = 0
    metric: Metric = ACCURACY
    chosen_round: int | None = None
    at_rank: Mapping[int, float] = field(default_factory=dict)
    client_seconds: float = math.nan
    server_seconds: float = math.nan

    @property
    def sent(self) -> list[float]:
        """MB so far, down and up."""
        return [(d + u) / MEGABYTE for d, u in zip(self.bytes_down, self.bytes_up, strict=True)]

    @property
    def best_round(self) -> int:
        """The run's own choice, else the first with the best validation score, else the last."""
        if self.chosen_round is not None:
            return self.chosen_round
        known = [r for r, value in enumerate(self.validation) if r and math.isfinite(value)]
        merit = self.metric.merit
        return max(known, key=lambda r: merit(self.validation[r]), default=len(self.test) - 1)

    def first_round_at(self, score: float) -> int | None:
        """Return the first round whose test score is at least as good as this one.

        None if there is none, or not every round since the first has a test score.
        """
        if not all(map(math.isfinite, self.test[1:])):
            return None
        merit = self.metric.merit
        wanted = merit(score)
        return next((r for r, value in enumerate(self.test) if merit(value) >= wanted), None)


def read_curve(folder: Path) -> Curve:
    """Read a run folder's ``metrics.jsonl``.

    Raises
    ------
    ValueError
        If there is no such file, or no round in it.
    """
    rounds, best, summary = _rounds(folder), best_entry(folder), _summary(folder)
    metric = task_of({name for line in rounds for name in line["metrics"]}).primary
    for line in rounds:
        if "round" in best and line["server_round"] == best["round"]:
            line["metrics"] = {**best, **line["metrics"]}  # its test scores came later
    rounds[-1]["metrics"] = {**summary.get("final", {}), **rounds[-1]["metrics"]}
    return Curve(
        test=_metric(rounds, metric.key("test")),
        validation=_metric(rounds, metric.key("validation")),
        bytes_down=tuple(accumulate(r["bytes_down"] for r in rounds)),
        bytes_up=tuple(accumulate(r["bytes_up"] for r in rounds)),
        failures=sum(r.get("failures", 0) for r in rounds),
        metric=metric,
        chosen_round=best.get("round"),
        at_rank=_at_rank(summary),
        client_seconds=_seconds(summary, "clients"),
        server_seconds=_seconds(summary, "server"),
    )


def _at_rank(summary: Mapping[str, Any]) -> dict[int, float]:
    # A device whose layer types differ in rank is not one of a column.
    rows = [row for row in summary.get("device_ranks", ()) if "ranks" not in row]
    return {row["rank"]: row["federated"] for row in rows if row["federated"] is not None}


def _seconds(summary: Mapping[str, Any], part: str) -> float:
    value = summary.get("cpu_seconds", {}).get(part)
    return math.nan if value is None else float(value)


def last_validation(folder: Path, metric: Metric) -> float:
    """Return a run's validation score in its last round; NaN if it is not known.

    Raises
    ------
    ValueError
        As `read_curve`.
    """
    return _metric(_rounds(folder), metric.key("validation"))[-1]


@dataclass(frozen=True)
class Spread:
    """Values of several seeds."""

    each: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean; NaN of none."""
        return statistics.fmean(self.each) if self.each else math.nan

    @property
    def sd(self) -> float:
        """Sample standard deviation; NaN of fewer than two."""
        return statistics.stdev(self.each) if len(self.each) > 1 else math.nan


@dataclass(frozen=True)
class Row:
    """Results of a method in one cell, over the seeds whose runs finished.

    Parameters
    ----------
    final, best
        Test score in the last round, and in the one with the best validation score.
    rounds_to_baseline, mb_to_baseline
        Until the test score is that of the baseline's last round on the same seed, over the
        seeds that get there.
    mb_down, mb_up
        Of the whole run.
    lora_B_lr_ratio
        Learning rate of lora_B over ``learning_rate``.
    ranks
        Rank budgets that occur, in ascending order; one for all has no slices.
    at_rank
        Test score of the last round's adapter cut to the rank of a device, by rank.
    client_seconds, server_seconds
        CPU seconds of all rounds, of all clients and of the server.
    difference
        Of ``final`` from the baseline's on the same seeds.
    """

    cell: str
    method: str
    learning_rate: float
    max_rank: int
    seeds: tuple[int, ...]
    final: Spread
    best: Spread
    rounds_to_baseline: Spread
    mb_to_baseline: Spread
    mb_down: Spread
    mb_up: Spread
    lora_B_lr_ratio: float = 1.0
    ranks: tuple[int, ...] = ()
    at_rank: Mapping[int, Spread] = field(default_factory=dict)
    client_seconds: Spread = Spread(())
    server_seconds: Spread = Spread(())
    difference: Paired = field(default_factory=lambda: Paired(()))

    @property
    def has_one_rank(self) -> bool:
        """Whether all clients train at one rank."""
        return len(self.ranks) == 1


def make_row(
    cell: str,
    method: str,
    learning_rate: float,
    max_rank: int,
    curves: Mapping[int, Curve],
    baseline: Mapping[int, Curve],
    *,
    lora_B_lr_ratio: float = 1.0,
    ranks: Sequence[int] = (),
) -> Row:
    """Sum up a method's runs.

    Parameters
    ----------
    curves, baseline
        Seed to the method's and to the baseline's run.
    """
    reached = [
        (curve, at)
        for seed, curve in curves.items()
        if seed in baseline and (at := curve.first_round_at(baseline[seed].test[-1])) is not None
    ]
    runs = curves.values()
    last = {seed: run.test[-1] for seed, run in curves.items()}
    at_rank = {
        rank: Spread(tuple(run.at_rank[rank] for run in runs if rank in run.at_rank))
        for rank in sorted({rank for run in runs for rank in run.at_rank})
    }
    return Row(
        cell,
        method,
        learning_rate,
        max_rank,
        tuple(curves),
        final=Spread(tuple(last.values())),
        best=Spread(tuple(run.test[run.best_round] for run in runs)),
        rounds_to_baseline=Spread(tuple(float(at) for _, at in reached)),
        mb_to_baseline=Spread(tuple(run.sent[at] for run, at in reached)),
        mb_down=Spread(tuple(run.bytes_down[-1] / MEGABYTE for run in runs)),
        mb_up=Spread(tuple(run.bytes_up[-1] / MEGABYTE for run in runs)),
        lora_B_lr_ratio=lora_B_lr_ratio,
        ranks=tuple(sorted(set(ranks))),
        at_rank=at_rank,
        client_seconds=Spread(tuple(run.client_seconds for run in runs)),
        server_seconds=Spread(tuple(run.server_seconds for run in runs)),
        difference=Paired.of(last, {seed: run.test[-1] for seed, run in baseline.items()}),
    )


def best_entry(folder: Path) -> dict[str, Any]:
    """Return what a run's summary says of its best validation round; empty if nothing."""
    return dict(_summary(folder).get("best_validation", {}))


def _summary(folder: Path) -> dict[str, Any]:
    """Return a run's summary; empty before its end."""
    try:
        return dict(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _rounds(folder: Path) -> list[dict[str, Any]]:
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no readable metrics.jsonl: {error}") from error
    rounds = [line for line in lines if line.get("kind") == "round"]
    if not rounds:
        raise ValueError(f"{folder}: metrics.jsonl has no round")
    return rounds


def _metric(rounds: Sequence[Mapping[str, Any]], name: str) -> tuple[float, ...]:
    values = [r["metrics"].get(name) for r in rounds]
    return tuple(math.nan if value is None else float(value) for value in values)
