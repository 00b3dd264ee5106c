"""The run as text: readable in a terminal of 80 columns, and line by line in a log."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from hafl_app.metrics import task_of
from hafl_app.printable import printable
from hafl_app.tracking.as_text import Printer, megabytes, short_duration
from hafl_app.tracking.base import (
    FAILED,
    NO_HISTORY,
    ClientRecord,
    ClientRow,
    History,
    RoundRecord,
)
from hafl_app.tracking.closing import Clock, print_closing
from hafl_app.tracking.tables import client_table


class ConsoleTracker:
    """Print the clients, a line a round, and the results.

    Parameters
    ----------
    console
        Where to print; ``None`` is standard output, 80 columns wide when it is no terminal.
    num_rounds
        Rounds of training the run is to have.
    seconds_left
        Of the whole run after a round, None if unknown; without it the rounds are counted.
    folder
        Of the run, for the commands that may follow.
    closes
        Whether the results are printed here. A command that shows the run prints them itself,
        once it knows how long it took.
    """

    def __init__(
        self,
        console: Console | None,
        num_rounds: int,
        *,
        seconds_left: Callable[[], float | None] | None = None,
        folder: Path | None = None,
        closes: bool = True,
    ) -> None:
        self._printer = Printer(console)
        self._num_rounds = num_rounds
        self._seconds_left = seconds_left or self._of_the_rounds
        self._folder, self._closes = folder, closes
        self._rounds: list[RoundRecord] = []
        self._before_training = "untrained"
        self._late: dict[int, int] = {}  # round to the clients that their time stopped

    def start(
        self,
        settings: Mapping[str, Any],
        clients: Sequence[ClientRow],
        history: History = NO_HISTORY,
    ) -> None:
        """Print a table of the clients, by rank when there are many."""
        self._rounds = list(history.rounds)
        if settings.get("model", {}).get("head") == "closed_form":
            self._before_training = "head alone"
        examples = sum(client.examples for client in clients)
        title = f"{len(clients)} clients, {examples:,} examples, MB of a round"
        self._printer.table(title, *client_table(clients))
        if history.rounds:
            self._printer.line(f"going on after round {history.rounds[-1].server_round}")
        self._printer.line()

    def log_round(self, record: RoundRecord) -> None:
        """Print one line, or two where it is long."""
        self._rounds.append(record)
        width = len(str(self._num_rounds))
        sent = megabytes(record.bytes_down + record.bytes_up)
        parts = [
            f"round {record.server_round:>{width}}/{self._num_rounds}",
            *_scores(record.metrics),
            f"loss {_loss(record.train_loss):>6}",
            f"{sent:>7}",
            f"{short_duration(record.seconds):>5}",
            _simulated(record),
            _epsilon(record.metrics),
            _rate(record.metrics),
            self._time_left(record),
        ]
        shown = [Text(part) for part in parts]
        if record.failures:
            asked = record.replies + record.failures
            shown.append(Text(f"{record.failures} of {asked} clients failed", style="red"))
        if late := self._late.get(record.server_round):
            shown.append(Text(f"{late} stopped by their time", style="yellow"))
        self._printer.parts(shown)

    def log_client(self, record: ClientRecord) -> None:
        """Print a line for a client that failed, nothing for another."""
        if record.out_of_time:
            self._late[record.server_round] = self._late.get(record.server_round, 0) + 1
        if record.error:
            who = f"client {record.partition_id} (node {record.node_id}, rank {record.rank})"
            why = printable(record.error, 400)
            self._printer.line(f"round {record.server_round}: {who} failed: {why}", "red")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Print the results, see `hafl_app.tracking.closing`."""
        if self._closes:
            clock = Clock(summary.get("seconds", math.nan))
            print_closing(self._printer, summary, self._rounds, clock, self._folder)

    def fail(self, reason: str, status: str = FAILED) -> None:
        """Print the reason."""
        ended = "The run failed" if status == FAILED else f"The run was {status}"
        self._printer.line(f"{ended}: {printable(reason, 2000)}", "red")

    def _time_left(self, record: RoundRecord) -> str:
        if record.server_round == 0:
            return self._before_training
        if record.server_round >= self._num_rounds:
            return ""
        left = self._seconds_left()
        return "" if left is None else f"ETA {short_duration(left)}"

    def _of_the_rounds(self) -> float | None:
        """Return the seconds of the rounds that are left, by the mean of those that were."""
        seconds = [past.seconds for past in self._rounds if past.server_round > 0]
        left = self._num_rounds - self._rounds[-1].server_round
        return left * statistics.fmean(seconds) if seconds else None


def _scores(metrics: Mapping[str, float]) -> list[str]:
    """Return a round's central scores, or, where the server has no data, the clients'.

    The test data are not scored in every round, so that they have no column of their own.
    """
    metric = task_of(metrics).primary
    shown = {"val": metric.key("validation"), "test": metric.key("test")}
    if metric.key("clients") in metrics and not set(shown.values()) & set(metrics):
        shown = {"clients": metric.key("clients")}
    elif shown["test"] not in metrics:
        del shown["test"]
    scores = [f"{name} {metric.text(metrics.get(key)):>5}" for name, key in shown.items()]
    return [f"{metric.unit} {scores[0]}".lstrip(), *scores[1:]]


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def _epsilon(metrics: Mapping[str, float]) -> str:
    return f"epsilon {metrics['privacy/epsilon']:.2f}" if "privacy/epsilon" in metrics else ""


def _rate(metrics: Mapping[str, float]) -> str:
    key = "schedule/learning_rate"
    return f"rate {metrics[key]:.2g}" if key in metrics else ""


def _simulated(record: RoundRecord) -> str:
    seconds = record.simulated_seconds
    return f"sim {short_duration(seconds)}" if math.isfinite(seconds) else ""
