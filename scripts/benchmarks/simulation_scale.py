"""Cost of a simulated federation by its registered clients, and its growth over rounds."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
from matplotlib.figure import Figure

from benchmarks.simulation_ours import client_app, serve
from benchmarks.simulation_task import SimulationTask
from hafl_app.engines.in_process import InProcessGrid, server_identity

REGISTERED = "registered clients"
"""Name of the first table."""
ASKED = 50
"""Clients that train in a round, or all if there are fewer."""
_PAYLOAD_BYTES = 300_000


@dataclass(frozen=True)
class Growth:
    """Time and memory of a run of many rounds.

    Parameters
    ----------
    start
        Seconds until the first round begins: all nodes are asked what they are.
    rounds
        Seconds of each round.
    memory_mb
        Resident memory at the end of each round, 10^6 bytes.
    """

    start: float
    rounds: list[float]
    memory_mb: list[float]


def grow(task: SimulationTask) -> Growth:
    """Run a task in the in-process engine and watch it."""
    process = psutil.Process()
    ends, memory = [], []

    def on_round() -> None:
        ends.append(time.perf_counter())
        memory.append(process.memory_info().rss / 1e6)

    with server_identity():
        grid = InProcessGrid(client_app(task), task.num_clients)
        started = time.perf_counter()
        serve(grid, task, on_round, lambda: ends.append(time.perf_counter()))
    rounds = [after - before for before, after in pairwise(ends)]
    return Growth(ends[0] - started, rounds, memory)


def task_of(registered: int, rounds: int, overrides: Sequence[str] = ()) -> SimulationTask:
    """Return a task in which at most `ASKED` of the registered clients take part in a round."""
    share = f"federation.fraction_train={min(1.0, ASKED / registered)}"
    payload = 0 if overrides else _PAYLOAD_BYTES
    return SimulationTask(registered, rounds, payload, (share, *overrides))


def report(
    registered: Sequence[int], rounds: int, training: Sequence[str]
) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """Yield the table of cost by registered clients, and that of 1,000 clients that train.

    Parameters
    ----------
    registered
        Numbers of clients.
    rounds
        Of each, at least 2; of those that train ten times as many at the most.
    training
        Settings of the clients that train; none leaves them out.
    """
    yield REGISTERED, [_row(number, rounds) for number in registered]
    if training:
        growth = grow(task_of(1000, rounds, training))
        yield "1,000 clients that train", list(_fifths(growth))


def draw_costs(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Draw the table of cost by registered clients into a PNG: time, and memory."""
    registered = [_number(row["registered"]) for row in rows]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    times, memory = figure.subplots(1, 2)
    for column, label, marker, color in (
        ("start, s", "before the first round", "s", "#D55E00"),
        ("round, s", f"a round, {ASKED} clients asked at most", "o", "#0072B2"),
    ):
        seconds = [_number(row[column]) for row in rows]
        times.plot(registered, seconds, marker=marker, color=color, label=label)
    times.set(xscale="log", yscale="log", xlabel=REGISTERED, ylabel="seconds")
    times.legend()
    memory.plot(registered, [_number(row["memory, MB"]) for row in rows], "o-", color="#0072B2")
    memory.set(xscale="log", xlabel=REGISTERED, ylabel="resident memory, MB", ylim=(0, None))
    for axes in (times, memory):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)


def _number(value: object) -> float:
    return float(str(value))


def _row(registered: int, rounds: int) -> dict[str, object]:
    growth = grow(task_of(registered, rounds))
    per_round = statistics.median(growth.rounds)
    asked = min(ASKED, registered)
    return {
        "registered": registered,
        "asked in a round": asked,
        "start, s": f"{growth.start:.3g}",
        "round, s": f"{per_round:.3g}",
        "ms per client asked": f"{per_round / asked * 1e3:.3g}",
        "memory, MB": f"{growth.memory_mb[-1]:.0f}",
    }


def _fifths(growth: Growth) -> Iterator[dict[str, object]]:
    """Yield what the run did in each fifth: flat if nothing piles up."""
    size = max(1, len(growth.rounds) // 5)
    for start in range(0, len(growth.rounds), size):
        seconds = growth.rounds[start : start + size]
        yield {
            "rounds": f"{start + 1} to {start + len(seconds)}",
            "rounds per minute": f"{60 / statistics.mean(seconds):.3g}",
            "memory, MB": f"{growth.memory_mb[start + len(seconds) - 1]:.0f}",
        }
