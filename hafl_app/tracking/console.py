"""The run as text: readable in a terminal, and line by line in a log."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hafl_app.metrics import ACCURACY, Metric, task_of
from hafl_app.printable import printable
from hafl_app.tracking.base import (
    FAILED,
    NO_HISTORY,
    ClientRecord,
    ClientRow,
    History,
    RoundRecord,
)
from hafl_app.tracking.closing import closing_lines

LOG_WIDTH = 100
ROWS_BEFORE_GROUPING = 20
MEGABYTE = 1e6

# A rule of ASCII dashes under the header and nothing else, so that a log keeps it as it is.
_HEADER_RULE = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


class ConsoleTracker:
    """Print the clients, a line a round, and the results.

    Parameters
    ----------
    console
        Where to print; ``None`` is standard output, `LOG_WIDTH` wide when it is no terminal.
    num_rounds
        Rounds of training the run is to have, for the progress and the time left.
    """

    def __init__(self, console: Console | None, num_rounds: int) -> None:
        self._console = console or _standard_output()
        self._num_rounds = num_rounds
        self._rounds: list[RoundRecord] = []
        self._trainings: list[ClientRecord] = []
        self._before_training = "untrained"

    def start(
        self,
        settings: Mapping[str, Any],
        clients: Sequence[ClientRow],
        history: History = NO_HISTORY,
    ) -> None:
        """Print a table of the clients, by rank when there are many."""
        self._rounds, self._trainings = list(history.rounds), list(history.clients)
        if settings.get("model", {}).get("head") == "closed_form":
            self._before_training = "head alone"
        examples = sum(client.examples for client in clients)
        title = f"{len(clients)} clients, {examples:,} examples"
        if len(clients) > ROWS_BEFORE_GROUPING:
            self._print_table(title, _RANK_COLUMNS, _rows_by_rank(clients))
        else:
            self._print_table(title, _CLIENT_COLUMNS, _rows_by_client(clients))
        if history.rounds:
            self._print(Text(f"going on after round {history.rounds[-1].server_round}"))
        self._console.print()

    def log_round(self, record: RoundRecord) -> None:
        """Print one line."""
        self._rounds.append(record)
        width = len(str(self._num_rounds))
        parts = [
            f"round {record.server_round:>{width}}/{self._num_rounds}",
            *_scores(record.metrics),
            f"loss {_loss(record.train_loss):>6}",
            f"down {megabytes(record.bytes_down):>8}",
            f"up {megabytes(record.bytes_up):>8}",
            f"{duration(record.seconds):>6}",
            _simulated(record),
            _epsilon(record.metrics),
            self._time_left(record),
        ]
        line = Text("  ".join(part for part in parts if part))
        if record.failures:
            asked = record.replies + record.failures
            line.append(f"  {record.failures} of {asked} clients failed", style="red")
        if late := self._out_of_time(record.server_round):
            line.append(f"  {late} stopped by their time", style="yellow")
        self._print(line)

    def log_client(self, record: ClientRecord) -> None:
        """Print one line for a client that failed, nothing for another."""
        self._trainings.append(record)
        if record.error:
            who = f"client {record.partition_id} (node {record.node_id}, rank {record.rank})"
            why = printable(record.error, 400)
            self._print(Text(f"round {record.server_round}: {who} failed: {why}", style="red"))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Print the results, the traffic and, from ``device_ranks``, what each device gains."""
        if self._rounds:
            self._print_table("Results", *_results(self._rounds, summary))
        if self._trainings:
            title = "Traffic by client rank"
            self._print_table(title, _TRAFFIC_COLUMNS, _traffic_rows(self._trainings))
        if devices := summary.get("device_ranks"):
            metric = task_of([summary.get("metric", "")]).primary
            title = "What each device gains"
            columns, rows = _DEVICE_COLUMNS, [_device_row(row, metric) for row in devices]
            if any("alone_at_max_rank" in row for row in devices):
                columns = {**columns, "alone at max rank": "right"}
                rows = [
                    [*cells, metric.text(row.get("alone_at_max_rank"))]
                    for cells, row in zip(rows, devices, strict=True)
                ]
            self._print_table(title, columns, rows)
            self._print(
                Text(
                    "federated: the rank-r slice of the global adapter; alone: a client of that "
                    "rank training\nby itself, mean over the clients counted; "
                    f"{_gain_unit(metric)}.",
                    style="dim",
                )
            )
        for line in closing_lines(summary):
            self._print(Text(printable(line, 2000)))
        self._print(Text(f"\n{self._totals()}", style="bold"))

    def fail(self, reason: str, status: str = FAILED) -> None:
        """Print the reason."""
        ended = "The run failed" if status == FAILED else f"The run was {status}"
        self._print(Text(f"{ended}: {printable(reason, 2000)}", style="red"))

    def _out_of_time(self, server_round: int) -> int:
        trained = (one for one in self._trainings if one.server_round == server_round)
        return sum(one.out_of_time for one in trained)

    def _time_left(self, record: RoundRecord) -> str:
        left = self._num_rounds - record.server_round
        if record.server_round == 0:
            return self._before_training
        if left <= 0:
            return ""
        seconds = [past.seconds for past in self._rounds if past.server_round > 0]
        return f"ETA {duration(left * statistics.fmean(seconds))}"

    def _totals(self) -> str:
        trained = sum(record.server_round > 0 for record in self._rounds)
        seconds = sum(record.seconds for record in self._rounds)
        down = sum(record.bytes_down for record in self._rounds)
        up = sum(record.bytes_up for record in self._rounds)
        return (
            f"{trained} {'round' if trained == 1 else 'rounds'} in {duration(seconds)}, "
            f"{megabytes(down)} down and {megabytes(up)} up."
        )

    def _print(self, line: Text) -> None:
        # Soft wrap: a log line is one line however long it is.
        self._console.print(line, soft_wrap=True, highlight=False)

    def _print_table(
        self, title: str, columns: Mapping[str, str], rows: Sequence[Sequence[str | Text]]
    ) -> None:
        table = Table(box=_HEADER_RULE, show_edge=False, pad_edge=False, header_style="bold")
        for name, justify in columns.items():
            table.add_column(Text(name), justify="left" if justify == "left" else "right")
        for row in rows:
            # As Text: a node's device may be called "[/red]", which is no markup of ours.
            table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
        self._print(Text(f"\n{title}", style="bold"))
        self._console.print(table, highlight=False)


def percent(value: float | None) -> str:
    """Fraction as a percentage with one decimal; ``-`` when there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.1%}"


def points(value: float | None) -> Text:
    """Difference of two fractions in signed percentage points, green above 0 and red below."""
    if value is None or not math.isfinite(value):
        return Text("-")
    return _signed(round(100 * value, 1), 1)


def gained(value: float | None) -> Text:
    """Gain of any metric, signed, green above 0 and red below."""
    if value is None or not math.isfinite(value):
        return Text("-")
    return _signed(round(value, 2), 2)


def _signed(rounded: float, decimals: int) -> Text:
    if rounded == 0:
        return Text(f"{0:.{decimals}f}")
    return Text(f"{rounded:+.{decimals}f}", style="green" if rounded > 0 else "red")


def megabytes(count: float) -> str:
    """Bytes in MB of 10^6 bytes, with three significant digits."""
    size = count / MEGABYTE
    if count == 0:
        return "0 MB"
    if size < 0.001:
        return "<0.001 MB"
    decimals = max(0, min(3, 2 - math.floor(math.log10(size))))
    return f"{size:,.{decimals}f} MB"


def duration(seconds: float) -> str:
    """Seconds in words with two units at most, e.g. ``1 min 05 s``."""
    if round(seconds, 1) < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _standard_output() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=LOG_WIDTH)


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
    unit = f" {metric.unit}" if metric.unit else ""
    return [f"{name}{unit} {metric.text(metrics.get(key)):>6}" for name, key in shown.items()]


def _gain_unit(metric: Metric) -> str:
    if metric.is_share:
        return "gain in percentage points"
    way = "higher" if metric.higher_is_better else "lower"
    return f"gain: by how much the {metric.title} is {way}"


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


_TRAFFIC_NAMES = ["down a round", "up a round"]
_CLIENT_COLUMNS = {
    **dict.fromkeys(["client", "rank", "examples", *_TRAFFIC_NAMES], "right"),
    "device": "left",
}
_RANK_COLUMNS = dict.fromkeys(
    ["rank", "clients", "examples min", "median", "max", *_TRAFFIC_NAMES], "right"
)
_TRAFFIC_COLUMNS = dict.fromkeys(
    ["rank", "trainings", "down each", "up each", "down total", "up total"], "right"
)
_DEVICE_COLUMNS = dict.fromkeys(["rank", "federated", "alone", "gain", "clients alone"], "right")


def _rows_by_client(clients: Sequence[ClientRow]) -> list[list[str]]:
    return [
        [
            str(client.partition_id),
            str(client.rank),
            f"{client.examples:,}",
            megabytes(client.bytes_down),
            megabytes(client.bytes_up),
            printable(client.device, 60),
        ]
        for client in sorted(clients, key=lambda client: client.partition_id)
    ]


def _epsilon(metrics: Mapping[str, float]) -> str:
    return f"epsilon {metrics['privacy/epsilon']:.2f}" if "privacy/epsilon" in metrics else ""


def _simulated(record: RoundRecord) -> str:
    seconds = record.simulated_seconds
    return f"simulated {duration(seconds)}" if math.isfinite(seconds) else ""


def _rows_by_rank(clients: Sequence[ClientRow]) -> list[list[str]]:
    rows = []
    for rank in sorted({client.rank for client in clients}):
        same = [client for client in clients if client.rank == rank]
        sizes = [client.examples for client in same]
        middle = statistics.median(sizes)
        counts = [min(sizes), middle, max(sizes)]
        traffic = [
            megabytes(statistics.fmean(client.bytes_down for client in same)),
            megabytes(statistics.fmean(client.bytes_up for client in same)),
        ]
        rows.append([str(rank), str(len(sizes)), *(f"{count:,.0f}" for count in counts), *traffic])
    return rows


def _results(
    rounds: Sequence[RoundRecord], summary: Mapping[str, Any]
) -> tuple[dict[str, str], list[list[str]]]:
    """Return columns and rows: the last round and the best, by the server's data if it has any."""
    seen = {name for record in rounds for name in record.metrics}
    task = task_of(seen)
    keys = {task.primary.key(phase) for phase in ("validation", "test")}
    central = task.primary.key("clients") not in seen or bool(seen & keys)
    phases = ["validation", "test"] if central else ["clients"]
    shown = [*((phase, task.primary) for phase in phases), (phases[-1], task.second)]
    entry = summary.get(f"best_{phases[0]}", {})
    # The summary has scores that came after the round's record.
    chosen = {"last round": (rounds[-1], {**summary.get("final", {}), **rounds[-1].metrics})}
    if best := _best(rounds, task.primary, phases[0], entry.get("round")):
        chosen[f"best {phases[0]}"] = best, {**entry, **best.metrics}
    rows = [
        [
            label,
            str(record.server_round),
            *(metric.text(metrics.get(metric.key(phase))) for phase, metric in shown),
        ]
        for label, (record, metrics) in chosen.items()
    ]
    titles = [f"{phase}{_word(metric)}" for phase, metric in shown]
    return {"": "left", **dict.fromkeys(["round", *titles], "right")}, rows


def _word(metric: Metric) -> str:
    """Return a metric's name for a heading, with a space before it; empty for the accuracy."""
    return "" if metric is ACCURACY else f" {metric.title}"


def _best(
    rounds: Sequence[RoundRecord], metric: Metric, phase: str, chosen: int | None
) -> RoundRecord | None:
    """Return the round that the run chose, else that with the best score."""
    if chosen is not None:
        return next((record for record in rounds if record.server_round == chosen), None)
    key = metric.key(phase)
    scored = [
        record
        for record in rounds
        if record.server_round > 0 and math.isfinite(record.metrics.get(key, math.nan))
    ]
    return max(scored, key=lambda record: metric.merit(record.metrics[key]), default=None)


def _traffic_rows(records: Sequence[ClientRecord]) -> list[list[str]]:
    rows = []
    for rank in sorted({record.rank for record in records}):
        same = [record for record in records if record.rank == rank]
        # What a training costs is read off those that went through.
        whole = [record for record in same if not record.error] or same
        sizes = [
            statistics.fmean(record.bytes_down for record in whole),
            statistics.fmean(record.bytes_up for record in whole),
            sum(record.bytes_down for record in same),
            sum(record.bytes_up for record in same),
        ]
        rows.append([str(rank), str(len(same)), *(megabytes(size) for size in sizes)])
    return rows


def _device_row(row: Mapping[str, Any], metric: Metric) -> list[str | Text]:
    return [
        "/".join(str(rank) for rank in row.get("ranks", [row["rank"]])),
        metric.text(row["federated"]),
        metric.text(row.get("alone")),
        points(row.get("gain")) if metric.is_share else gained(row.get("gain")),
        str(row.get("clients_alone", 0)),
    ]
