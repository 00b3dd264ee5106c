"""Standardize any table to one with a text and a label, checked row by row."""

from collections.abc import Collection, Sequence
from typing import Any

import datasets
import numpy as np
import pandas as pd

from hafl_app.data.errors import DataError, require_column
from hafl_app.data.label_rules import comparable_name, normal_labels, normal_name

NOTES = "notes"
"""Attribute of a table: in words, what was changed in it."""


def standardize(
    table: pd.DataFrame,
    text_column: str,
    label_column: str,
    origin: str,
    *,
    allow_blank: bool = False,
    listed: Collection[str] = (),
) -> pd.DataFrame:
    """Add the columns ``text`` and ``label``, both strings, and keep the others.

    What was changed in the labels is in the table's ``attrs``, under `NOTES`.

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
    listed
        Label names that may differ as little as they like.

    Raises
    ------
    DataError
        If the table is empty, a column is missing, text and label are one column, a text or label
        is null, a text is not a string, or blank without leave, or `normal_labels` refuses the
        labels.
    """
    if text_column == label_column:
        raise DataError(f"{origin}: column {text_column!r} cannot be both the text and the label")
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
    broken = text.map(_has_surrogate)
    _refuse(broken, f"{origin}: column {text_column!r} has half a surrogate pair", "expected text")
    what = f"{origin}: column {label_column!r}"
    label, notes = normal_labels(table[label_column], what, listed)
    result = table.assign(text=text, label=label)
    result.attrs[NOTES] = tuple(notes)
    return result


def index_labels(table: pd.DataFrame, names: Sequence[str], origin: str) -> pd.DataFrame:
    """Replace label names by their indices.

    Raises
    ------
    DataError
        If a label is not among ``names``.
    """
    index = {normal_name(name): i for i, name in enumerate(names)}
    unknown = ~table["label"].isin(list(index))
    if unknown.any():
        first = int(unknown.to_numpy().argmax())
        near = comparable_name(table["label"].iloc[first]) in {
            comparable_name(name) for name in index
        }
        # The label is not quoted: under a wrong label_column it is a private text.
        raise DataError(
            f"{origin} data: {int(unknown.sum())} rows, the first is row {first + 1}, have a label "
            f"that is not among the {len(names)} label names"
            + ("; it differs from one only in how it is written" if near else "")
        )
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
    except OverflowError:
        raise DataError(f"{origin} data: a column has a number of more than 64 bits") from None
    except UnicodeError:
        raise DataError(f"{origin} data: a column has half a surrogate pair") from None
    except (ValueError, TypeError, NotImplementedError) as error:
        # The last part of pyarrow's message names the column; the others quote a cell.
        raise DataError(f"{origin} data: a column mixes types ({error.args[-1]})") from None


def _refuse(bad: "pd.Series[Any]", what: str, expected: str) -> None:
    """Raise if any row is bad, naming the first one."""
    rows = bad.to_numpy().nonzero()[0]
    if len(rows):
        more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
        raise DataError(f"{what} in row {rows[0] + 1}{more}; {expected}")


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
