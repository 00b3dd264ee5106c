"""Timing of several ways to compute the same thing: in turn, with medians, ranges and ratios."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hafl_app.training.device import cpu_name

Job = Callable[[], object]


class DisagreementError(RuntimeError):
    """Ways that should compute the same do not: then no time means anything."""


@dataclass(frozen=True)
class Timing:
    """Times of one way.

    Parameters
    ----------
    seconds
        Of every counted call, at least one.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median time in seconds."""
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        """Return ``median (least-most)`` in milliseconds."""
        low, high = min(self.seconds), max(self.seconds)
        return f"{self.median * 1e3:.4g} ({low * 1e3:.4g}-{high * 1e3:.4g})"


def time_in_turn(
    jobs: Mapping[str, Job],
    repeats: int,
    *,
    patience_s: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time jobs alternately, so that a change of the machine's speed meets all of them.

    Every round begins with another job: what one leaves in caches and allocator meets all as well.

    Parameters
    ----------
    jobs
        By name; each is called once for warming up, which is not counted.
    repeats
        Counted calls of each, at least 1.
    patience_s
        A job whose first call takes longer is not called again: that call counts.
    clock
        In seconds. `time.process_time` counts the CPU time of this process alone.
    """
    first = {name: _time(job, clock) for name, job in jobs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    names = [name for name in jobs if first[name] <= patience_s]
    for turn in range(repeats if names else 0):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(_time(jobs[name], clock))
    return {name: Timing(tuple(values or [first[name]])) for name, values in seconds.items()}


def _time(job: Job, clock: Callable[[], float]) -> float:
    started = clock()
    job()
    return clock() - started


def machine() -> dict[str, Any]:
    """Describe where the times were taken: processor, cores, threads, load, versions, date."""
    return {
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def describe(where: Mapping[str, Any]) -> str:
    """Return one line about a `machine`."""
    return (
        f"{where['processor']}, {where['cores']} cores, {where['threads']} threads used, "
        f"load {where['load']}, CUDA {where['cuda'] or 'none'}, Python {where['python']}, "
        f"torch {where['torch']}, {where['date']}"
    )


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows of the same keys as a Markdown table."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Write results, or leave what is there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
