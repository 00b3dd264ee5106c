"""A comparison as a table: Markdown to read, CSV and JSON to process."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from hafl_app.experiments.results import Row
from hafl_app.metrics import ACCURACY, Metric
from hafl_app.printable import markdown_code, markdown_text
from hafl_app.reports.statistics import Spread
from hafl_app.reports.tables import Table, difference_cells, score, size

_LONGEST_COMMAND = 4000
_TO_BASELINE = ("rounds to baseline", "MB to baseline")
_OF_DEVICES = ("simulated_seconds", "seconds_to_baseline", "seconds_to_target")
_SIMULATED = ("simulated s", "simulated s to baseline", "simulated s to target")
DIFFERENCE_COLUMNS = ("method", "difference", "95 % interval", "pairs")


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
    precision: str = ""
    devices: str = ""


def markdown(
    rows: Sequence[Row], alone: Mapping[str, Sequence[Sequence[str]]], source: Provenance
) -> str:
    """Return the tables of every cell, and the provenance.

    Scores and bytes of every method; its slices at the ranks of the devices and its seconds, and
    what clients reach alone, as far as measured; differences from the baseline.

    Parameters
    ----------
    alone
        Cell to rows of `ALONE_COLUMNS`.
    """
    parts = [f"# {markdown_text(source.title)}"]
    for cell in dict.fromkeys(row.cell for row in rows):
        if cell:
            parts.append(f"## {markdown_text(cell)}")
        its = [row for row in rows if row.cell == cell]
        parts.append(_as_grid([_scores(row, source.metric) for row in its]))
        if any(row.at_rank or math.isfinite(row.client_seconds.mean) for row in its):
            parts.append(_as_grid(device_cells(its, source.metric)))
        if alone.get(cell):
            parts.append(Table("", ALONE_COLUMNS, alone[cell]).markdown())
        if differences := difference_rows(its, source):
            parts.append(Table("", DIFFERENCE_COLUMNS, differences).markdown())
    parts.append(_footer(source))
    return "\n\n".join(parts) + "\n"


_OF_LONE_CLIENTS = ("alone", "alone_at_max_rank")
ALONE_COLUMNS = ("method", "client rank", "federated", "alone, own rank", "alone, max rank")


def alone_cells(
    method: str, by_seed: Sequence[Sequence[Mapping[str, Any]]], metric: Metric = ACCURACY
) -> list[list[str]]:
    """Return rows of `ALONE_COLUMNS` from the ``device_ranks`` of a method's summaries."""
    rows = []
    known = [row for summary in by_seed for row in summary if "alone" in row]
    for rank in sorted({row["rank"] for row in known}):
        same = [row for row in known if row["rank"] == rank]
        each = {
            key: Spread(tuple(row[key] for row in same if row.get(key) is not None))
            for key in ("federated", "alone", "alone_at_max_rank")
        }
        rows.append([method, str(rank), *(score(spread, metric) for spread in each.values())])
    return rows


def beside_lone_clients(
    ranks: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]],
) -> dict[str, list[list[dict[str, Any]]]]:
    """Return every method's ``device_ranks``, a list a seed, beside clients that trained alone.

    Who trains alone does not meet the method: where one method alone measured it, the others'
    slices of the same seed and rank stand beside the same lone clients.

    Parameters
    ----------
    ranks
        Method to seed to the ``device_ranks`` of its summary.
    """
    own = {m: [[*map(dict, rows)] for rows in by_seed.values()] for m, by_seed in ranks.items()}
    measured = [m for m, by_seed in ranks.items() if any("alone" in r for r in _all(by_seed))]
    if len(measured) != 1:
        return own
    lone = {
        (seed, row["rank"]): {key: row[key] for key in _OF_LONE_CLIENTS if key in row}
        for seed, rows in ranks[measured[0]].items()
        for row in rows
        if "ranks" not in row
    }
    others = {
        method: [
            [{**row, **lone.get((seed, row["rank"]), {})} for row in rows if "ranks" not in row]
            for seed, rows in by_seed.items()
        ]
        for method, by_seed in ranks.items()
        if method not in measured
    }
    return {method: others.get(method, own[method]) for method in ranks}


def _all(by_seed: Mapping[int, Sequence[Mapping[str, Any]]]) -> Iterator[Mapping[str, Any]]:
    return chain.from_iterable(by_seed.values())


def write_tables(
    folder: Path,
    rows: Sequence[Row],
    alone: Mapping[str, Sequence[Sequence[str]]],
    source: Provenance,
) -> str:
    """Write ``table.md``, ``table.csv`` and ``results.json``; return the Markdown."""
    text = markdown(rows, alone, source)
    (folder / "table.md").write_text(text, encoding="utf-8")
    plain = [_plain(row) for row in rows]
    # Not every method has every slice; what has a value a seed stands in the JSON alone.
    frame = pd.DataFrame(plain)
    several = [name for name in frame if frame[name].map(lambda cell: isinstance(cell, list)).any()]
    frame.drop(columns=several).to_csv(folder / "table.csv", index=False, lineterminator="\n")
    results = {**asdict(source), "metric": source.metric.name, "rows": plain}
    (folder / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    return text


def device_cells(rows: Sequence[Row], metric: Metric) -> list[dict[str, str]]:
    """Return a line a method, by column: its slice at the rank of each device, and its seconds.

    A method that trains all clients at one rank has no slices.
    """
    ranks = sorted({rank for row in rows if not row.has_one_rank for rank in row.at_rank})
    return [
        {
            "method": row.method,
            **{
                f"rank {rank}": "-"
                if row.has_one_rank
                else score(row.at_rank.get(rank, Spread(())), metric)
                for rank in ranks
            },
            "whole": score(row.final, metric),
            "client CPU s": size(row.client_seconds.mean),
            "server CPU s": size(row.server_seconds.mean),
        }
        for row in rows
    ]


def difference_rows(rows: Sequence[Row], source: Provenance) -> list[list[str]]:
    """Return rows of `DIFFERENCE_COLUMNS` for all methods but the baseline."""
    return [
        [row.method, *difference_cells(row.difference, source.metric)]
        for row in rows
        if row.method != source.baseline and row.difference.each
    ]


def _scores(row: Row, metric: Metric) -> dict[str, str]:
    """Return a method's line of the first table, by column."""
    return {
        "method": row.method,
        "rank": _ranks(row),
        "learning rate": f"{row.learning_rate:g}",
        "lr ratio": f"{row.lora_B_lr_ratio:g}",
        "test, last round": score(row.final, metric),
        "test, best validation": score(row.best, metric),
        **dict(zip(_TO_BASELINE, (_rounds(row), size(row.mb_to_baseline.mean)), strict=True)),
        "MB down": size(row.mb_down.mean),
        "MB up": size(row.mb_up.mean),
        **dict(zip(_SIMULATED, _simulated(row), strict=True)),
    }


def _simulated(row: Row) -> list[str]:
    target = row.seconds_to_target
    return [
        size(row.simulated_seconds.mean),
        size(row.seconds_to_baseline.mean),
        f"{size(target.mean)}{_some(target, row)}",
    ]


def _ranks(row: Row) -> str:
    if not row.ranks:
        return str(row.max_rank)
    return f"{row.ranks[0]} for all" if row.has_one_rank else f"{row.ranks[0]} to {row.ranks[-1]}"


def _rounds(row: Row) -> str:
    if not row.rounds_to_baseline.each:
        return "-"
    return f"{row.rounds_to_baseline.mean:.1f}{_some(row.rounds_to_baseline, row)}"


def _some(reached: Spread, row: Row) -> str:
    """Return how many seeds get there, if not all or none do."""
    count = len(reached.each)
    return f" ({count} of {len(row.seeds)} seeds)" if 0 < count < len(row.seeds) else ""


def _as_grid(lines: Sequence[Mapping[str, str]]) -> str:
    """Return the Markdown of lines by column, without columns of what was not measured."""
    columns = [
        column
        for column in lines[0]
        if column not in (*_TO_BASELINE, *_SIMULATED) or any(line[column] != "-" for line in lines)
    ]
    return Table("", columns, [[line[name] for name in columns] for line in lines]).markdown()


def _footer(source: Provenance) -> str:
    name = source.metric.title
    unit = " in percent" if source.metric.is_share else ""
    return "\n".join(
        [
            f"Test {name}{unit}: mean ± standard deviation over the seeds. To baseline: until the "
            f"test {name} of {source.baseline}'s last round on the same seed is reached, mean over "
            "the seeds that reach it (-: none, or unknown without federation.test_every=1). MB of "
            "10^6 bytes: all messages of training, evaluation and heads, over all clients and "
            "rounds. "
            "Rank r: the last round's adapter cut to its best approximation of rank r (-: all "
            "clients train at one rank; beside methods for mixed ranks it is the largest that "
            "costs no more bytes on average). CPU seconds: of all clients and of the server, all "
            f"rounds, evaluation left out. Difference: from {source.baseline} in the last round, "
            "paired by seed, with Student's interval of the mean (one pair has none).",
            "",
            f"- command: {markdown_code(source.command, _LONGEST_COMMAND)}",
            *([f"- model: {markdown_text(', '.join(source.models))}"] if source.models else []),
            f"- seeds: {', '.join(map(str, source.seeds))} ({len(source.seeds)})",
            *([f"- precision: {source.precision}"] if source.precision else []),
            *([f"- simulated seconds: {source.devices}"] if source.devices else []),
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
        "lora_B_lr_ratio": row.lora_B_lr_ratio,
        "seeds": list(row.seeds),
        "ranks": list(row.ranks),
    }
    for name, value in vars(row).items():
        if isinstance(value, Spread) and (value.each or name not in _OF_DEVICES):
            plain[f"{name}_mean"] = value.mean if math.isfinite(value.mean) else None
            plain[f"{name}_sd"] = value.sd if math.isfinite(value.sd) else None
            plain[f"{name}_each"] = [one if math.isfinite(one) else None for one in value.each]
    for rank, spread in row.at_rank.items():
        plain[f"at_rank_{rank}_mean"] = spread.mean if math.isfinite(spread.mean) else None
        plain[f"at_rank_{rank}_each"] = list(spread.each)
    ends = row.difference.interval or (None, None)
    mean = row.difference.mean
    plain["difference_mean"] = mean if math.isfinite(mean) else None
    plain["difference_low"], plain["difference_high"] = ends
    plain["difference_each"] = list(row.difference.each)
    return plain
