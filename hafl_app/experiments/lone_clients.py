"""Clients that trained alone, beside the slices of a comparison's methods."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from hafl_app.metrics import ACCURACY, Metric
from hafl_app.reports.statistics import Spread
from hafl_app.reports.tables import score

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
