"""Curve of a run: its scores by round, and what it cost to get there."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from hafl_app.metrics import ACCURACY, Metric, task_of
from hafl_app.reports.records import UnreadableRunError, read_records, read_summary, rounds_of

MEGABYTE: Final = 1e6
SIMULATED: Final = "simulated_seconds"
"""Seconds of a round on the devices that were simulated, in the records of rounds that have it."""


@dataclass(frozen=True)
class Curve:
    """Curve of a run from round 0: values of `metric` (NaN if unknown), and bytes so far.

    Unless ``federation.test_every=1``, `test` is known of the last and the best round at least.
    `failures` counts the trainings, of all rounds, that did not count; `chosen_round` is the best
    as the run chose it, if it did. `at_rank` is the test score of the last round's adapter cut to
    the rank of a device, by rank, as far as it was measured; `client_seconds` and `server_seconds`
    are CPU seconds of all rounds, NaN if unknown. `simulated` are the seconds so far on simulated
    devices, NaN without any, and `seconds_to_target` those until ``devices.target``, NaN if never.
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
    simulated: tuple[float, ...] = ()
    seconds_to_target: float = math.nan

    @property
    def sent(self) -> list[float]:
        """MB so far, down and up."""
        return [(d + u) / MEGABYTE for d, u in zip(self.bytes_down, self.bytes_up, strict=True)]

    @property
    def simulated_seconds(self) -> float:
        """Seconds of all rounds on simulated devices; NaN without any."""
        return self.simulated[-1] if self.simulated else math.nan

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
    """Read a run folder's ``metrics.jsonl`` and what its summary adds.

    Raises
    ------
    UnreadableRunError
        If there is no such file, no round in it, or it is no run's.
    """
    rounds, summary = rounds_of(read_records(folder)), read_summary(folder)
    try:
        return _curve(rounds, summary)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnreadableRunError(
            f"{folder}: its records are no run's: {type(error).__name__}: {error}"
        ) from error


def last_validation(folder: Path, metric: Metric) -> float:
    """Return a run's validation score in its last round; NaN if it is not known.

    Raises
    ------
    UnreadableRunError
        As `read_curve`.
    """
    return _metric(rounds_of(read_records(folder)), metric.key("validation"))[-1]


def best_entry(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run's summary says of its best validation round; empty if nothing."""
    return dict(summary.get("best_validation", {}))


def _curve(rounds: list[dict[str, Any]], summary: Mapping[str, Any]) -> Curve:
    best = best_entry(summary)
    metric = task_of({name for line in rounds for name in line["metrics"]}).primary
    for line in rounds:
        if "round" in best and line["server_round"] == best["round"]:
            line["metrics"] = {**best, **line["metrics"]}  # its test scores came later
    rounds[-1]["metrics"] = {**summary.get("final", {}), **rounds[-1]["metrics"]}
    return Curve(
        test=_metric(rounds, metric.key("test")),
        validation=_metric(rounds, metric.key("validation")),
        bytes_down=tuple(accumulate(int(r["bytes_down"]) for r in rounds)),
        bytes_up=tuple(accumulate(int(r["bytes_up"]) for r in rounds)),
        failures=sum(int(r.get("failures", 0)) for r in rounds),
        metric=metric,
        chosen_round=_chosen(best, len(rounds)),
        at_rank=_at_rank(summary),
        client_seconds=_seconds(summary, "clients"),
        server_seconds=_seconds(summary, "server"),
        simulated=tuple(accumulate(_number(r.get(SIMULATED)) for r in rounds)),
        seconds_to_target=_seconds_to_target(summary),
    )


def _chosen(best: Mapping[str, Any], num_rounds: int) -> int | None:
    if "round" not in best:
        return None
    if best["round"] not in range(num_rounds):
        raise ValueError(f"its best round is {best['round']!r}, of {num_rounds - 1}")
    return int(best["round"])


def _at_rank(summary: Mapping[str, Any]) -> dict[int, float]:
    # A device whose layer types differ in rank is not one of a column.
    rows = [row for row in summary.get("device_ranks", ()) if "ranks" not in row]
    return {row["rank"]: row["federated"] for row in rows if row["federated"] is not None}


def _seconds(summary: Mapping[str, Any], part: str) -> float:
    return _number(summary.get("cpu_seconds", {}).get(part))


def _seconds_to_target(summary: Mapping[str, Any]) -> float:
    reached = summary.get("simulated_time", {}).get("to_target", {})
    return _number(reached.get("seconds"))


def _metric(rounds: Sequence[Mapping[str, Any]], name: str) -> tuple[float, ...]:
    return tuple(_number(r["metrics"].get(name)) for r in rounds)


def _number(value: Any) -> float:
    """Return a recorded number; NaN, which JSON does not have, of null."""
    return math.nan if value is None else float(value)
