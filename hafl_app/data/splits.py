"""Random splits of rows, by class where asked."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hafl_app.data.errors import DataError

Rows = npt.NDArray[np.int64]
"""Indices of rows."""


def split_off(
    indices: npt.ArrayLike,
    fraction: float,
    seed: int | Sequence[int],
    labels: npt.ArrayLike | None = None,
) -> tuple[Rows, Rows]:
    """Split a random share off some rows.

    With labels, each class gives its share to within one row, the larger classes first, so that
    a class of a single row keeps it as long as others can give. Classes are served by the divisor
    method of Webster: the j-th row of a class of n comes at (j - 1/2) / n.

    Parameters
    ----------
    indices
        Rows, shape (n,).
    fraction
        Share in [0, 1). Above 0, it takes at least one of two or more rows, and never all.
    seed
        Not negative.
    labels
        Class of each of the n rows, shape (n,); None for a split regardless of class.

    Returns
    -------
    kept, split_off
        Rows in the order of ``indices``, together n.

    Raises
    ------
    DataError
        If the share is not in [0, 1) or there is not one label per row.
    """
    rows = np.asarray(indices, dtype=np.int64)
    classes = np.zeros(len(rows), np.int64) if labels is None else np.asarray(labels)
    if not 0 <= fraction < 1:
        raise DataError(f"the share to split off is {fraction}, expected at least 0 and below 1")
    if len(classes) != len(rows):
        raise DataError(f"{len(classes)} labels for {len(rows)} rows, expected one each")
    if fraction == 0 or len(rows) < 2:
        return rows, rows[:0]
    size = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    order = np.random.default_rng(seed).permutation(len(rows))
    taken = order[np.argsort(_place_in_class(classes[order]), kind="stable")[:size]]
    mask = np.zeros(len(rows), dtype=bool)
    mask[taken] = True
    return rows[~mask], rows[mask]


def _place_in_class(classes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return (j - 1/2) / n for the j-th of the n rows of its class."""
    _, inverse, counts = np.unique(classes, return_inverse=True, return_counts=True)
    by_class = np.argsort(inverse, kind="stable")
    before = np.repeat(np.cumsum(counts) - counts, counts)
    place = np.empty(len(classes))
    place[by_class] = np.arange(len(classes)) - before + 0.5
    return place / counts[inverse]
