"""What each step of a client's round costs in process, for clients that do nothing."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

from benchmarks import simulation_ours
from benchmarks.simulation_task import NoOp, SimulationTask
from hafl_app.server import coordinator, round_messages
from hafl_app.server.influence import InfluenceMeter
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.base import HeterogeneousLora

REST = "all else: Flower's messages and hooks, metrics, logs"
# What takes the time, by the place where the code looks it up.
STEPS: Sequence[tuple[str, Any, str]] = (
    ("client: read what was sent", simulation_ours, "read_adapter"),
    ("client: read what was sent", simulation_ours, "from_arrays"),
    ("client: its work", NoOp, "train"),
    ("client: write the reply", simulation_ours, "to_arrays"),
    ("client: write the reply", simulation_ours, "adapter_content"),
    ("server: plans and requests", HeterogeneousLora, "configure_train"),
    ("server: count the bytes", round_messages, "message_bytes"),
    ("server: read and check the reply", round_messages, "read_metrics"),
    ("server: read and check the reply", round_messages, "read_update"),
    ("server: read and check the reply", round_messages, "from_arrays"),
    ("server: is all finite, and of what size", ClientUpdate, "size"),
    ("server: sum up", coordinator, "merge"),
    ("server: who decides the step", InfluenceMeter, "note"),
    ("server: who decides the step", InfluenceMeter, "result"),
)


class Stopwatch:
    """CPU seconds by step; a step inside another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inside, self._since = [REST], time.process_time()

    def lap(self) -> dict[str, float]:
        """Return the seconds since the last lap, and begin anew."""
        self._charge()
        seconds = dict(self.seconds)
        self.seconds.clear()
        return seconds

    def timed(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time charged to a step."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._charge()
            self._inside.append(step)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._inside.pop()

        return wrapper

    def _charge(self) -> None:
        now = time.process_time()
        self.seconds[self._inside[-1]] += now - self._since
        self._since = now


def report(
    tasks: dict[str, SimulationTask],
) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """Run tasks of clients that do nothing; yield each one's name and a row a step."""
    for name, task in tasks.items():
        laps = _laps(task)
        rows: list[dict[str, object]] = []
        for step in [*dict.fromkeys(step for step, _, _ in STEPS), REST]:
            each = sorted(1e3 * lap.get(step, 0.0) / task.num_clients for lap in laps)
            rows.append({"step": step, "ms per client": _spread(each)})
        totals = sorted(1e3 * sum(lap.values()) / task.num_clients for lap in laps)
        yield name, [*rows, {"step": "together", "ms per client": _spread(totals)}]


def _laps(task: SimulationTask) -> list[dict[str, float]]:
    """Return the seconds by step of each round but the first."""
    laps = list[dict[str, float]]()
    with _watched() as watch:
        simulation_ours.run_inprocess(task, lambda: laps.append(watch.lap()))
    return laps[1:]


@contextmanager
def _watched() -> Iterator[Stopwatch]:
    watch, patches = Stopwatch(), []
    for step, owner, name in STEPS:
        value = vars(owner)[name]
        if isinstance(value, functools.cached_property):
            timed: Any = functools.cached_property(watch.timed(step, value.func))
            timed.__set_name__(owner, name)
        else:
            timed = watch.timed(step, value)
        patches.append(patch.object(owner, name, timed))
    for one in patches:
        one.start()
    try:
        yield watch
    finally:
        for one in patches:
            one.stop()


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.3f} ({values[0]:.3f}-{values[-1]:.3f})"
