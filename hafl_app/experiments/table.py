"""A comparison as a table: Markdown to read, CSV and JSON to process."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hafl_app.experiments.lone_clients import ALONE_COLUMNS
from hafl_app.experiments.results import Row
from hafl_app.metrics import ACCURACY, Metric
from hafl_app.printable import markdown_code, markdown_text
from hafl_app.reports.statistics import Paired, Spread
from hafl_app.reports.tables import Table, difference_cells, difference_text, score, size
from hafl_app.tracking.jsonl import replace_file

_LONGEST_COMMAND = _LONGEST_LIST = 4000
_SEEDS = "seeds"
_TO_BASELINE = ("rounds to baseline", "MB to baseline")
_OF_DEVICES = ("simulated_seconds", "seconds_to_baseline", "seconds_to_target")
_SIMULATED = ("simulated s", "simulated s to baseline", "simulated s to target")
_IF_KNOWN = (_SEEDS, *_TO_BASELINE, *_SIMULATED)
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
    experiment: str = ""
    at_edge: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


def markdown(
    rows: Sequence[Row], alone: Mapping[str, Sequence[Sequence[str]]], source: Provenance
) -> str:
    """Return the tables of every cell, and the provenance.

    Scores and bytes of every method; its slices at the ranks of the devices and its seconds, and
    what clients reach alone, as far as measured; differences from the baseline, of the whole and
    of each slice.

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
        parts.append(_as_grid([_scores(row, source) for row in its]))
        if any(row.at_rank or math.isfinite(row.client_seconds.mean) for row in its):
            parts.append(_as_grid(device_cells(its, source.metric)))
        if alone.get(cell):
            parts.append(Table("", ALONE_COLUMNS, alone[cell]).markdown())
        if differences := difference_rows(its, source):
            parts.append(Table("", DIFFERENCE_COLUMNS, differences).markdown())
        if slices := slice_differences(its, source):
            parts.append(_as_grid(slices))
    parts.append(_footer(source, one_rank=_has_one_rank_baseline(rows, source)))
    return "\n\n".join(parts) + "\n"


def write_tables(
    folder: Path,
    rows: Sequence[Row],
    alone: Mapping[str, Sequence[Sequence[str]]],
    source: Provenance,
) -> str:
    """Write ``table.md``, ``table.csv`` and ``results.json``; return the Markdown."""
    text = markdown(rows, alone, source)
    replace_file(folder / "table.md", text)
    plain = [_plain(row) for row in rows]
    # Not every method has every slice; what has a value a seed stands in the JSON alone.
    frame = pd.DataFrame(plain)
    several = [name for name in frame if frame[name].map(lambda cell: isinstance(cell, list)).any()]
    csv = frame.drop(columns=several).to_csv(index=False, lineterminator="\n")
    replace_file(folder / "table.csv", csv)
    results = {**asdict(source), "metric": source.metric.name, "rows": plain}
    replace_file(folder / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
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


def slice_differences(rows: Sequence[Row], source: Provenance) -> list[dict[str, str]]:
    """Return a line a method, by column: its slices' differences from the baseline's.

    For all methods but the baseline that have a slice of the rank of one of its devices.
    """
    others = [row for row in rows if row.method != source.baseline]
    ranks = sorted({r for row in others for r, its in row.at_rank_difference.items() if its.each})
    return [
        {
            "method": row.method,
            **{
                f"difference at rank {rank}": difference_text(
                    row.at_rank_difference.get(rank, Paired(())), source.metric
                )
                for rank in ranks
            },
        }
        for row in others
        if any(its.each for its in row.at_rank_difference.values())
    ]


def _scores(row: Row, source: Provenance) -> dict[str, str]:
    """Return a method's line of the first table, by column."""
    metric, scored = source.metric, sum(map(math.isfinite, row.final.each))
    return {
        "method": row.method,
        "rank": _ranks(row),
        "learning rate": f"{row.learning_rate:g}",
        "lr ratio": f"{row.lora_B_lr_ratio:g}",
        _SEEDS: f"{scored} of {len(source.seeds)}" if scored < len(source.seeds) else "-",
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
    """Return the Markdown of lines by column, without those that may be empty and are."""
    columns = [
        column
        for column in lines[0]
        if column not in _IF_KNOWN or any(line[column] != "-" for line in lines)
    ]
    return Table("", columns, [[line[name] for name in columns] for line in lines]).markdown()


def _has_one_rank_baseline(rows: Sequence[Row], source: Provenance) -> bool:
    return any(row.has_one_rank for row in rows if row.method == source.baseline)


def _footer(source: Provenance, *, one_rank: bool) -> str:
    name = source.metric.title
    of_slices = (
        "none at the devices' ranks, since all clients of the baseline train at one; "
        "compare.baseline= names another"
        if one_rank
        else f"at rank r: of the slice from that of {source.baseline}, with the 95 % interval and "
        "the number of pairs"
    )
    unit = " in percent" if source.metric.is_share else ""
    return "\n".join(
        [
            f"Test {name}{unit}: mean ± standard deviation over the seeds, or over as many "
            "as the column seeds says, whose run finished with a score. To baseline: until the "
            f"test {name} of {source.baseline}'s last round on the same seed is reached, mean over "
            "the seeds that reach it (-: none, or unknown without federation.test_every=1). MB of "
            "10^6 bytes: all messages of training, evaluation and heads, over all clients and "
            "rounds. "
            "Rank r: the last round's adapter cut to its best approximation of rank r (-: all "
            "clients train at one rank; beside methods for mixed ranks it is the largest that "
            "costs no more bytes on average). CPU seconds: of all clients and of the server, all "
            f"rounds, evaluation left out. Difference: from {source.baseline} in the last round, "
            "paired by seed, with Student's interval of the mean (one pair has none); "
            f"{of_slices}.",
            "",
            f"- command: {markdown_code(source.command, _LONGEST_COMMAND)}",
            *([f"- model: {markdown_text(', '.join(source.models))}"] if source.models else []),
            f"- seeds: {', '.join(map(str, source.seeds))} ({len(source.seeds)})",
            *([f"- precision: {source.precision}"] if source.precision else []),
            *([f"- simulated seconds: {source.devices}"] if source.devices else []),
            f"- learning rates: {markdown_text(source.tuning)}",
            *_listed("at the edge of the grid, so that a wider one may be better", source.at_edge),
            *_listed("failed, and not in the tables", source.failed),
            f"- hardware: {markdown_text(source.hardware)}",
            f"- versions: {markdown_text(source.versions)}",
        ]
    )


def _listed(what: str, names: Sequence[str]) -> list[str]:
    return [f"- {what}: {markdown_text('; '.join(names), _LONGEST_LIST)}"] if names else []


def _plain(row: Row) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "cell": row.cell,
        "method": row.method,
        "max_rank": row.max_rank,
        "learning_rate": row.learning_rate,
        "lora_B_lr_ratio": row.lora_B_lr_ratio,
        "num_seeds": len(row.seeds),
        "seeds": list(row.seeds),
        "ranks": list(row.ranks),
    }
    for name, value in vars(row).items():
        if isinstance(value, Spread) and (value.each or name not in _OF_DEVICES):
            plain |= _plain_spread(name, value)
    for rank, spread in row.at_rank.items():
        plain |= _plain_spread(f"at_rank_{rank}", spread)
    for rank, paired in row.at_rank_difference.items():
        plain |= _plain_difference(f"at_rank_{rank}_difference", paired)
    return plain | _plain_difference("difference", row.difference)


def _plain_spread(name: str, spread: Spread) -> dict[str, Any]:
    """Return mean, deviation and values; None, as JSON has no NaN, where one is not finite."""
    return {
        f"{name}_mean": _finite(spread.mean),
        f"{name}_sd": _finite(spread.sd),
        f"{name}_each": [_finite(value) for value in spread.each],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain_difference(name: str, paired: Paired) -> dict[str, Any]:
    low, high = paired.interval or (None, None)
    return {
        f"{name}_mean": _finite(paired.mean),
        f"{name}_low": low,
        f"{name}_high": high,
        f"{name}_each": list(paired.each),
    }
