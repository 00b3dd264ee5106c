"""A comparison as a table: Markdown to read, CSV and JSON to process."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hafl_app.experiments.results import Row, Spread
from hafl_app.metrics import ACCURACY, Metric
from hafl_app.printable import markdown_code, markdown_text

_LONGEST_COMMAND = 4000
_COLUMNS = (
    "method",
    "rank",
    "learning rate",
    "test, last round",
    "test, best validation",
    "rounds to baseline",
    "MB to baseline",
    "MB down",
    "MB up",
)


@dataclass(frozen=True)
class Provenance:
    """Origin of a table; all of it but the metric stands under the table as it is."""

    title: str
    baseline: str
    command: str
    hardware: str
    seeds: tuple[int, ...]
    tuning: str
    versions: str
    metric: Metric = ACCURACY
    models: tuple[str, ...] = ()


def percent(spread: Spread) -> str:
    """Return mean and deviation in percent, e.g. ``81.2 ± 0.4``; ``-`` if there is none."""
    return _mean_and_deviation(spread, 100, 1)


def score(spread: Spread, metric: Metric) -> str:
    """Return mean and deviation of a metric: shares in percent, others with two decimals."""
    return percent(spread) if metric.is_share else _mean_and_deviation(spread, 1, 2)


def _mean_and_deviation(spread: Spread, factor: float, decimals: int) -> str:
    if not math.isfinite(spread.mean):
        return "-"
    deviation = f" ± {factor * spread.sd:.{decimals}f}" if math.isfinite(spread.sd) else ""
    return f"{factor * spread.mean:.{decimals}f}{deviation}"


def size(value: float) -> str:
    """Return a number with three significant digits or whole; ``-`` if there is none."""
    if not math.isfinite(value):
        return "-"
    decimals = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{min(decimals, 3)}f}"


def markdown(
    rows: Sequence[Row], alone: Mapping[str, Sequence[Sequence[str]]], source: Provenance
) -> str:
    """Return the table of every cell, what clients reach alone if known, and the provenance.

    Parameters
    ----------
    alone
        Cell to rows of `ALONE_COLUMNS`.
    """
    parts = [f"# {markdown_text(source.title)}"]
    for cell in dict.fromkeys(row.cell for row in rows):
        if cell:
            parts.append(f"## {markdown_text(cell)}")
        parts.append(
            _grid(_COLUMNS, [_cells(row, source.metric) for row in rows if row.cell == cell])
        )
        if alone.get(cell):
            parts.append(_grid(ALONE_COLUMNS, alone[cell]))
    parts.append(_footer(source))
    return "\n\n".join(parts) + "\n"


ALONE_COLUMNS = ("method", "client rank", "federated", "alone, own rank", "alone, max rank")


def alone_cells(
    method: str, by_seed: Sequence[Sequence[Mapping[str, Any]]], metric: Metric = ACCURACY
) -> list[list[str]]:
    """Return rows of `ALONE_COLUMNS` from the ``device_ranks`` of a method's summaries."""
    rows = []
    for rank in sorted({row["rank"] for summary in by_seed for row in summary}):
        same = [row for summary in by_seed for row in summary if row["rank"] == rank]
        each = {
            key: Spread(tuple(row[key] for row in same if row.get(key) is not None))
            for key in ("federated", "alone", "alone_at_max_rank")
        }
        rows.append([method, str(rank), *(score(spread, metric) for spread in each.values())])
    return rows


def write_tables(
    folder: Path,
    rows: Sequence[Row],
    alone: Mapping[str, Sequence[Sequence[str]]],
    source: Provenance,
) -> str:
    """Write ``table.md``, ``table.csv`` and ``results.json``; return the Markdown."""
    text = markdown(rows, alone, source)
    (folder / "table.md").write_text(text, encoding="utf-8")
    stream = io.StringIO()
    plain = [_plain(row) for row in rows]
    writer = csv.DictWriter(stream, fieldnames=_csv_fields(plain), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: v for k, v in row.items() if not isinstance(v, list)} for row in plain)
    (folder / "table.csv").write_text(stream.getvalue(), encoding="utf-8")
    results = {**asdict(source), "metric": source.metric.name, "rows": plain}
    (folder / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    return text


def _cells(row: Row, metric: Metric) -> list[str]:
    return [
        row.method,
        str(row.max_rank),
        f"{row.learning_rate:g}",
        score(row.final, metric),
        score(row.best, metric),
        _rounds(row),
        size(row.mb_to_baseline.mean),
        size(row.mb_down.mean),
        size(row.mb_up.mean),
    ]


def _rounds(row: Row) -> str:
    reached = len(row.rounds_to_baseline.each)
    if not reached:
        return "-"
    some = f" ({reached} of {len(row.seeds)} seeds)" if reached < len(row.seeds) else ""
    return f"{row.rounds_to_baseline.mean:.1f}{some}"


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up in a terminal too."""
    rows = [[markdown_text(text) for text in row] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]
    lines = [
        "| "
        + " | ".join(
            text.ljust(w) if i == 0 else text.rjust(w)
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in [columns, *rows]
    ]
    rule = (
        "| "
        + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths))
        + " |"
    )
    return "\n".join([lines[0], rule, *lines[1:]])


def _footer(source: Provenance) -> str:
    name = source.metric.title
    unit = " in percent" if source.metric.is_share else ""
    return "\n".join(
        [
            f"Test {name}{unit}: mean ± standard deviation over the seeds. To baseline: until the "
            f"test {name} of {source.baseline}'s last round on the same seed is reached, mean over "
            "the seeds that reach it (-: none, or unknown without federation.test_every=1). MB of "
            "10^6 bytes: all messages of training and evaluation, over all clients and rounds.",
            "",
            f"- command: {markdown_code(source.command, _LONGEST_COMMAND)}",
            *([f"- model: {markdown_text(', '.join(source.models))}"] if source.models else []),
            f"- seeds: {', '.join(map(str, source.seeds))}",
            f"- learning rates: {markdown_text(source.tuning)}",
            f"- hardware: {markdown_text(source.hardware)}",
            f"- versions: {markdown_text(source.versions)}",
        ]
    )


def _plain(row: Row) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "cell": row.cell,
        "method": row.method,
        "max_rank": row.max_rank,
        "learning_rate": row.learning_rate,
        "seeds": list(row.seeds),
    }
    for name, value in vars(row).items():
        if isinstance(value, Spread):
            plain[f"{name}_mean"] = value.mean if math.isfinite(value.mean) else None
            plain[f"{name}_sd"] = value.sd if math.isfinite(value.sd) else None
            plain[f"{name}_each"] = list(value.each)
    return plain


def _csv_fields(plain: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for key, value in plain[0].items() if not isinstance(value, list)] if plain else []
