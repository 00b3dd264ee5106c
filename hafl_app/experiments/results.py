"""Results of a comparison: one row a method."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hafl_app.reports.curve import MEGABYTE, Curve
from hafl_app.reports.statistics import Paired, Spread


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
    seconds_to_baseline
        The same in seconds on simulated devices.
    mb_down, mb_up
        Of the whole run.
    simulated_seconds
        Of the whole run on simulated devices.
    seconds_to_target
        On simulated devices until ``devices.target``, over the seeds that get there.
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
    at_rank_difference
        Of the slices from the baseline's of the same rank on the same seeds, by rank; empty if
        either of both trains all clients at one rank.
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
    client_seconds: Spread = field(default_factory=lambda: Spread(()))
    server_seconds: Spread = field(default_factory=lambda: Spread(()))
    simulated_seconds: Spread = field(default_factory=lambda: Spread(()))
    seconds_to_baseline: Spread = field(default_factory=lambda: Spread(()))
    seconds_to_target: Spread = field(default_factory=lambda: Spread(()))
    difference: Paired = field(default_factory=lambda: Paired(()))
    at_rank_difference: Mapping[int, Paired] = field(default_factory=dict)

    @property
    def has_one_rank(self) -> bool:
        """Whether all clients train at one rank."""
        return _is_one(self.ranks)


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
    baseline_ranks: Sequence[int] = (),
) -> Row:
    """Sum up a method's runs.

    Parameters
    ----------
    curves, baseline
        Seed to the method's and to the baseline's run.
    ranks, baseline_ranks
        Rank budgets of the method's and of the baseline's clients.
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
        simulated_seconds=_known(run.simulated_seconds for run in runs),
        seconds_to_baseline=_known(run.simulated[at] for run, at in reached if run.simulated),
        seconds_to_target=_known(run.seconds_to_target for run in runs),
        difference=Paired.of(last, {seed: run.test[-1] for seed, run in baseline.items()}),
        at_rank_difference={}
        if _is_one(ranks) or _is_one(baseline_ranks)
        else {rank: Paired.of(_slices(curves, rank), _slices(baseline, rank)) for rank in at_rank},
    )


def _is_one(ranks: Sequence[int]) -> bool:
    return len(set(ranks)) == 1


def _slices(curves: Mapping[int, Curve], rank: int) -> dict[int, float]:
    """Return the scores at a rank by seed, where they were measured."""
    return {seed: run.at_rank[rank] for seed, run in curves.items() if rank in run.at_rank}


def _known(values: Iterable[float]) -> Spread:
    return Spread(tuple(value for value in values if math.isfinite(value)))
