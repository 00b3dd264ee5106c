"""Seconds of a whole run by phase, on the wall and on the CPU.

The functions that do the work of a phase are wrapped while a run in this process goes on; the app
knows nothing of it. A phase within another one, as scoring within the start, counts once, for the
inner one. Training and encoding take place in this process too, so that nothing is missed.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest import mock

import psutil
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hafl_app.engines.in_process import run_federation

START, OTHER = "start", "other"
PHASES = {
    "training": (
        "hafl_app.client.handlers.train_locally",
        "hafl_app.client.cohort.train_cohort",
    ),
    "choosing a cohort": ("hafl_app.client.cohort.differ", "hafl_app.client.cohort.choose"),
    "lone clients": ("hafl_app.run.federation.train_alone",),
    "scoring by clients": ("hafl_app.client.handlers.score",),
    "scoring by the server": (
        "hafl_app.run.evaluation.CentralEvaluation.metrics",
        "hafl_app.run.evaluation.CentralEvaluation.primary_test_metric",
        "hafl_app.run.evaluation.CentralEvaluation.generation",
        "hafl_app.run.evaluation.CentralEvaluation.answers",
    ),
    "aggregation": ("hafl_app.server.coordinator.merge",),
    "codec": (
        "hafl_app.server.round_messages.RoundMessages.messages",
        "hafl_app.client.handlers.read_request",
        "hafl_app.client.handlers.training_reply",
        "hafl_app.server.round_messages.RoundMessages.validate_training",
        "hafl_app.server.round_messages.RoundMessages.validate_scores",
    ),
    "files": (
        "hafl_app.run.resuming.RunCheckpoints.save",
        "hafl_app.run.saved_adapters.save_adapter",
        "hafl_app.run.reporting.add_card",
        "hafl_app.reports.figures.curves.draw_curves",
    ),
}
"""The functions of each phase, where they are called from. The codec validates what it reads."""
_ROUNDS = "hafl_app.run.federation.run_rounds"
_UNDIVIDED = "lone clients"  # their training and messages count as theirs


@dataclass
class Seconds:
    """Time of a phase without that of the phases within it, and how often it was entered."""

    cpu: float = 0.0
    wall: float = 0.0
    calls: int = 0


class PhaseClock:
    """A stopwatch for phases that may lie within each other, all in one thread.

    Parameters
    ----------
    read
        Returns CPU and wall seconds since the process was started.
    phase
        To which all belongs that no inner phase accounts for, from the start of the process.

    Attributes
    ----------
    spent
        Time of each phase, up to the last change of phases.
    """

    def __init__(self, read: Callable[[], tuple[float, float]], phase: str) -> None:
        self.spent = {phase: Seconds()}
        self._read = read
        self._running = [phase]
        self._since = (0.0, 0.0)

    def switch(self, phase: str) -> None:
        """End the innermost phase and begin another one in its place."""
        now = self._read()
        seconds = self.spent[self._running[-1]]
        seconds.cpu += now[0] - self._since[0]
        seconds.wall += now[1] - self._since[1]
        self._since = now
        self._running[-1] = phase
        self.spent.setdefault(phase, Seconds())

    def timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """Return the function with its time counted as the phase's."""

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            outer = self._running[-1]
            if outer == _UNDIVIDED:
                return function(*arguments, **named)
            self.switch(phase)
            self._running.append(phase)
            self.spent[phase].calls += 1
            try:
                return function(*arguments, **named)
            finally:
                self._running.pop()
                self.switch(outer)

        return call


def process_seconds() -> tuple[float, float]:
    """Return CPU and wall seconds since this process was started."""
    return time.process_time(), time.time() - psutil.Process().create_time()


def measure(
    overrides: Sequence[str], read: Callable[[], tuple[float, float]] = process_seconds
) -> dict[str, Seconds]:
    """Run a federation in this process; return the time of each phase, the largest first.

    The start ends where the first round begins. What no phase accounts for is `OTHER`, so that all
    add up to the process's time since its start.
    """
    clock = PhaseClock(read, START)
    with _timed_app(clock):
        run_federation(overrides)
    clock.switch(OTHER)
    return dict(sorted(clock.spent.items(), key=lambda item: -item[1].cpu))


@contextmanager
def _timed_app(clock: PhaseClock) -> Iterator[None]:
    """Time the functions of `PHASES`, and let the start end where the rounds begin."""
    run_rounds = resolve_name(_ROUNDS)

    def run_rounds_after_the_start(*arguments: Any, **named: Any) -> Any:
        clock.switch(OTHER)
        return run_rounds(*arguments, **named)

    with ExitStack() as stack:
        stack.enter_context(mock.patch(_ROUNDS, run_rounds_after_the_start))
        for phase, targets in PHASES.items():
            for target in targets:
                timed = clock.timed(resolve_name(target), phase)
                stack.enter_context(mock.patch(target, timed))
        yield


def rows(spent: Mapping[str, Seconds]) -> list[dict[str, str]]:
    """Return a table's rows, one a phase, and the sum last."""
    total = Seconds(sum(s.cpu for s in spent.values()), sum(s.wall for s in spent.values()))
    return [
        {
            "phase": phase,
            "calls": str(seconds.calls) if phase in PHASES else "",
            "CPU, s": f"{seconds.cpu:.1f}",
            "share of CPU": f"{seconds.cpu / total.cpu:.1%}",
            "wall, s": f"{seconds.wall:.1f}",
        }
        for phase, seconds in {**spent, "all": total}.items()
    ]


def draw(spent: Mapping[str, Seconds], path: Path, title: str) -> None:
    """Draw a bar a phase, CPU beside wall, with the share of the CPU time, into a PNG."""
    figure = Figure(figsize=(8, 1.4 + 0.55 * len(spent)), layout="constrained")
    axes: Axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    total = sum(seconds.cpu for seconds in spent.values())
    places = range(len(spent))
    cpu, wall = ([getattr(s, kind) for s in spent.values()] for kind in ("cpu", "wall"))
    bars = axes.barh([p - 0.2 for p in places], cpu, 0.4, color="#0072B2", label="CPU")
    axes.barh([p + 0.2 for p in places], wall, 0.4, color="#E69F00", label="wall")
    axes.bar_label(bars, [f" {value / total:.1%} of CPU" for value in cpu], fontsize=9)
    axes.set_yticks(places, list(spent))
    axes.set(xlabel="seconds")
    axes.margins(x=0.18)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)
