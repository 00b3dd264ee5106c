"""From any table to one with a text and a label, checked row by row."""

from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import numpy as np
import pandas as pd

from hafl_app.data.errors import DataError, nearest

_LONGEST_NAME = 30  # of a column, in a message


def standardize(
    table: pd.DataFrame,
    text_column: str,
    label_column: str,
    origin: str,
    *,
    allow_blank: bool = False,
) -> pd.DataFrame:
    """Add the columns ``text`` and ``label``, both strings, and keep the others.

    Parameters
    ----------
    table
        One row per example.
    text_column, label_column
        Columns to take them from.
    origin
        File or hub name, for messages.
    allow_blank
        Whether a text may be empty; never null.

    Raises
    ------
    DataError
        If the table is empty, a column is missing, a text or label is null, a text is not a
        string, or blank without leave.
    """
    if table.empty:
        raise DataError(f"{origin} has no rows")
    require_column(table.columns, text_column, "dataset.text_column", origin)
    require_column(table.columns, label_column, "dataset.label_column", origin)
    for column in (text_column, label_column):
        _refuse(table[column].isna(), f"{origin}: column {column!r} is empty", "give it a value")
    text = table[text_column].astype(object)
    is_text = text.map(lambda value: isinstance(value, str))
    _refuse(~is_text, f"{origin}: column {text_column!r} is not a string", "expected text")
    if not allow_blank:
        blank = text.map(lambda value: not value.strip())
        _refuse(blank, f"{origin}: column {text_column!r} is blank", "expected text")
    label = table[label_column].astype(object).map(_label_name)
    return table.assign(text=text, label=label)


def require_column(columns: Iterable[Any], name: str, setting: str, origin: str) -> None:
    """Check that a column exists.

    Raises
    ------
    DataError
        If it does not; the message lists those that do.
    """
    names = [str(column) for column in columns]
    if name not in names:
        raise DataError(
            f"{setting}: {origin} has no column {name!r}, only {', '.join(map(_cut, names))}"
            f"{nearest(name, names)}"
        )


def sorted_label_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort label names: by value if all are integers, else alphabetically."""
    names = set(labels)
    try:
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(names))


def index_labels(table: pd.DataFrame, names: Sequence[str], origin: str) -> pd.DataFrame:
    """Replace label names by their indices.

    Raises
    ------
    DataError
        If a label is not among ``names``.
    """
    unknown = ~table["label"].isin(list(names))
    if unknown.any():
        # The label is not told: under a wrong label_column it is somebody's text.
        raise DataError(
            f"{origin} data: {int(unknown.sum())} rows, the first is row "
            f"{int(unknown.to_numpy().argmax()) + 1}, have a label that is not among the "
            f"{len(names)} label names"
        )
    index = {name: i for i, name in enumerate(names)}
    return table.assign(label=table["label"].map(index).astype("int64"))


def shuffled(table: pd.DataFrame, size: int | None, seed: Sequence[int]) -> pd.DataFrame:
    """Return a random subset of the rows, all of them if ``size`` is None, in a random order.

    Always shuffled: files sorted by label are common, and a subset of one must not be.
    """
    return table.iloc[np.random.default_rng(seed).permutation(len(table))[:size]]


def to_dataset(table: pd.DataFrame, origin: str) -> datasets.Dataset:
    """Make a data set in memory.

    Raises
    ------
    DataError
        If a column mixes types.
    """
    try:
        return datasets.Dataset.from_pandas(table, preserve_index=False)
    except (ValueError, TypeError) as error:
        # pyarrow's last word names the column; the ones before quote a cell, as the cause would.
        raise DataError(f"{origin} data: a column mixes types ({error.args[-1]})") from None


def _cut(name: str) -> str:
    # In a file without a header the names are somebody's data.
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."


def _refuse(bad: "pd.Series[Any]", what: str, expected: str) -> None:
    """Raise if any row is bad, naming the first one."""
    rows = bad.to_numpy().nonzero()[0]
    if len(rows):
        more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
        raise DataError(f"{what} in row {rows[0] + 1}{more}; {expected}")


def _label_name(value: Any) -> str:
    # A column of integers turns into floats on its way through pandas when a value was missing.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
