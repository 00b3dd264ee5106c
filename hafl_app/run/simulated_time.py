"""Simulated time of a run: what its devices must be able to do, and how long it took on them."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from flwr.serverapp import Grid
from flwr.superlink.grid import HttpGrid

from hafl_app.config.compose import SettingsError
from hafl_app.config.schema import Settings
from hafl_app.metrics import TASKS, Metric
from hafl_app.run import build
from hafl_app.tracking.base import RoundRecord
from hafl_app.wire.node_profile import NodeProfile

_PHASES = ("test", "validation", "clients")


def is_deployment(grid: Grid) -> bool:
    """Whether a grid's nodes are real: they take a time of their own."""
    return isinstance(grid, HttpGrid)


def check_nodes(grid: Grid, settings: Settings) -> None:
    """Refuse a simulated deadline for real nodes; without one, their time is predicted.

    Raises
    ------
    SettingsError
        In one line.
    """
    deadline_s = settings.devices.deadline_s
    if deadline_s is not None and is_deployment(grid):
        raise SettingsError(
            f"devices.deadline_s={deadline_s:g}: the nodes are real and take their own time, which "
            "devices only predict; expected null, federation.round_timeout_s ends the wait for them"
        )


def check_memory(settings: Settings, profiles: Sequence[NodeProfile], num_labels: int) -> None:
    """Refuse devices that have less memory than the tensors of their clients' training steps.

    Raises
    ------
    SettingsError
        Naming the class, the rank and the memory that it takes.
    """
    if (fleet := build.fleet(settings)) is None:
        return
    needed = build.step_memory(settings, num_labels)
    for name, rank in sorted({(fleet.name_of(p), max(p.ranks)) for p in profiles}):
        mb, there = needed.tensors_mb(rank), fleet.settings.classes[name].memory_mb
        if mb > there:
            raise SettingsError(
                f"devices.classes.{name}.memory_mb={there:g}: a training step at rank {rank} takes "
                f"{mb:.0f} MB at client.batch_size={settings.client.batch_size}"
            )


def time_facts(
    settings: Settings, rounds: Sequence[RoundRecord], profiles: Sequence[NodeProfile]
) -> dict[str, Any] | None:
    """Return the summary's entry on simulated time; None without a clock.

    Returns
    -------
    dict
        ``seconds`` of all rounds; ``partial_rounds``, in which not every reply counted; ``clients``
        by class of their devices; and, with ``devices.target``, ``to_target``, see `time_to`.
    """
    if (fleet := build.fleet(settings)) is None:
        return None
    facts: dict[str, Any] = {
        "seconds": sum(record.simulated_seconds for record in rounds),
        "partial_rounds": sum(bool(record.failures) for record in rounds),
        "clients": dict(Counter(fleet.name_of(profile) for profile in profiles)),
    }
    if (target := settings.devices.target) is not None:
        facts["to_target"] = time_to(target, rounds, TASKS[settings.model.task].primary)
    return facts


def time_to(target: float, rounds: Sequence[RoundRecord], metric: Metric) -> dict[str, Any]:
    """Return when a score was reached first.

    Returns
    -------
    dict
        ``target``; ``phase`` of the scores that decide: ``test`` where every round has one, else
        ``validation``, else ``clients``; ``round`` and simulated ``seconds``, None if never.
    """
    phase = _deciding_phase(rounds, metric)
    key, wanted = metric.key(phase), metric.merit(target)
    seconds = accumulate(record.simulated_seconds for record in rounds)
    reached = (
        (record.server_round, passed)
        for record, passed in zip(rounds, seconds, strict=True)
        if metric.merit(_score(record.metrics, key)) >= wanted
    )
    server_round, passed = next(reached, (None, None))
    return {"target": target, "phase": phase, "round": server_round, "seconds": passed}


def _deciding_phase(rounds: Sequence[RoundRecord], metric: Metric) -> str:
    trained = [record.metrics for record in rounds if record.server_round]
    for phase in _PHASES:
        known = [math.isfinite(_score(metrics, metric.key(phase))) for metrics in trained]
        if all(known) if phase == "test" else any(known):
            return phase
    return _PHASES[-1]


def _score(metrics: Mapping[str, float], key: str) -> float:
    return metrics.get(key, math.nan)
