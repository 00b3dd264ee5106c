"""CPU seconds of a run's rounds: the clients' part and the server's, where both are one process."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from flwr.serverapp import Grid


@runtime_checkable
class AnswersInProcess(Protocol):
    """A grid whose clients answer in this process, and that counts their CPU seconds."""

    @property
    def client_cpu_seconds(self) -> float:
        """CPU seconds of all threads in which clients have answered so far."""


class CpuSeconds:
    """Stopwatch of the rounds, in CPU seconds of all threads: other work on the machine adds none.

    The server's part is what it plans, packs, validates and merges: all of the rounds but the
    clients' answers and what is done `apart`.

    Parameters
    ----------
    grid
        Of the run. On a grid whose clients answer elsewhere nothing is measured.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._apart, self._clients, self._server = 0.0, 0.0, 0.0

    @contextmanager
    def rounds(self) -> Iterator[None]:
        """Add the rounds in it, or what belongs to them."""
        started, apart, clients = time.process_time(), self._apart, self._answers()
        yield
        answers = self._answers() - clients
        whole = time.process_time() - started
        self._clients += answers
        self._server += whole - answers - (self._apart - apart)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Leave what is in it out of the server's part: evaluation, reports, checkpoints."""
        started = time.process_time()
        yield
        self._apart += time.process_time() - started

    def to_json(self) -> dict[str, Any] | None:
        """Return ``clients`` and ``server``; None where clients answer elsewhere."""
        if not isinstance(self._grid, AnswersInProcess):
            return None
        return {"clients": self._clients, "server": self._server}

    def _answers(self) -> float:
        grid = self._grid
        return grid.client_cpu_seconds if isinstance(grid, AnswersInProcess) else 0.0
