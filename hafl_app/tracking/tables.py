"""Tables that a run prints: its clients, its results, what each device gains, its traffic."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from rich.text import Text

from hafl_app.metrics import ACCURACY, Metric, task_of
from hafl_app.printable import printable
from hafl_app.tracking.as_text import MEGABYTE, gained, megabytes, points
from hafl_app.tracking.base import ClientRow, RoundRecord

ROWS_BEFORE_GROUPING: Final = 20
PHASES: Final = {
    "train": "training",
    "evaluate": "evaluation",
    "alone": "training alone",
    "unseen": "unseen clients",
    "generate": "answers of clients",
}
"""Phases of a summary's ``bytes``, as they are called."""

_LONGEST_DEVICE = 30
_CLIENT_COLUMNS = {
    **dict.fromkeys(["client", "rank", "examples", "down", "up"], "right"),
    "device": "left",
}
_RANK_COLUMNS = dict.fromkeys(
    ["rank", "clients", "examples min", "median", "max", "down", "up"], "right"
)
_DEVICE_COLUMNS = dict.fromkeys(["rank", "federated", "alone", "gain", "clients alone"], "right")
_TRAFFIC_COLUMNS = {"": "left", **dict.fromkeys(["messages", "MB down", "MB up"], "right")}


class Rows(NamedTuple):
    """A table: heading to its alignment, and the cells of each row."""

    columns: Mapping[str, str]
    rows: Sequence[Sequence[str | Text]]


def client_table(clients: Sequence[ClientRow]) -> Rows:
    """Return a row a client with the bytes of a round, or a row a rank when they are many."""
    if len(clients) > ROWS_BEFORE_GROUPING:
        return Rows(_RANK_COLUMNS, _rows_by_rank(clients))
    rows = [
        [
            str(client.partition_id),
            str(client.rank),
            f"{client.examples:,}",
            megabytes(client.bytes_down),
            megabytes(client.bytes_up),
            printable(client.device, _LONGEST_DEVICE),
        ]
        for client in sorted(clients, key=lambda client: client.partition_id)
    ]
    return Rows(_CLIENT_COLUMNS, rows)


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


def result_table(rounds: Sequence[RoundRecord], summary: Mapping[str, Any]) -> Rows:
    """Return the last round and the best, by the server's data if it has any."""
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
    return Rows({"": "left", **dict.fromkeys(["round", *titles], "right")}, rows)


def _word(metric: Metric) -> str:
    """Return a metric's name for a heading, with a space before it; empty for the accuracy."""
    return "" if metric is ACCURACY else f" {metric.unit or metric.title}"


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


def device_table(devices: Sequence[Mapping[str, Any]], metric: Metric) -> Rows:
    """Return a row for each budget: its slice of the global adapter beside training alone."""
    columns, rows = dict(_DEVICE_COLUMNS), [_device_row(row, metric) for row in devices]
    if any("alone_at_max_rank" in row for row in devices):
        columns["at max rank"] = "right"
        rows = [
            [*cells, metric.text(row.get("alone_at_max_rank"))]
            for cells, row in zip(rows, devices, strict=True)
        ]
    return Rows(columns, rows)


def _device_row(row: Mapping[str, Any], metric: Metric) -> list[str | Text]:
    return [
        "/".join(str(rank) for rank in row.get("ranks", [row["rank"]])),
        metric.text(row["federated"]),
        metric.text(row.get("alone")),
        points(row.get("gain")) if metric.is_share else gained(row.get("gain")),
        str(row.get("clients_alone", 0)),
    ]


def device_note(metric: Metric) -> str:
    """Say what the columns of `device_table` are."""
    gain = "gain in percentage points"
    if not metric.is_share:
        way = "higher" if metric.higher_is_better else "lower"
        gain = f"gain: by how much the {metric.title} is {way}"
    return (
        "federated: the rank-r slice of the global adapter; alone: a client of that rank "
        f"training by itself, mean over the clients counted; {gain}."
    )


def traffic_table(sent: Mapping[str, Mapping[str, Any]]) -> Rows:
    """Return the MB of every phase, those of training by rank, and their sum.

    All rows have as many decimals, and the last one is the sum of those above as they are shown.

    Parameters
    ----------
    sent
        ``bytes`` of a summary.
    """
    lines: list[tuple[str, int, int, int]] = []
    for phase, name in PHASES.items():
        by_rank = sent.get(phase, {}).get("by_rank", {})
        by_rank = {rank: part for rank, part in by_rank.items() if part["exchanges"]}
        if phase == "train":
            lines += [(f"{name}, rank {rank}", *_sums([part])) for rank, part in by_rank.items()]
        elif by_rank:
            lines.append((name, *_sums(by_rank.values())))
    total = sum(down + up for _, _, down, up in lines) / MEGABYTE
    decimals = max(0, min(3, 3 - math.floor(math.log10(total)))) if total else 0
    shown = [
        (name, count, round(down / MEGABYTE, decimals), round(up / MEGABYTE, decimals))
        for name, count, down, up in lines
    ]
    if len(shown) > 1:
        _, counts, downs, ups = zip(*shown, strict=True)
        shown.append(("together", sum(counts), sum(downs), sum(ups)))
    rows = [
        [name, f"{count:,}", f"{down:,.{decimals}f}", f"{up:,.{decimals}f}"]
        for name, count, down, up in shown
    ]
    return Rows(_TRAFFIC_COLUMNS, rows)


def _sums(parts: Any) -> tuple[int, int, int]:
    """Return messages, bytes down and bytes up of some parts of a ledger."""
    names = ("exchanges", "bytes_down", "bytes_up")
    messages, down, up = (sum(part[name] for part in parts) for name in names)
    return messages, down, up
