"""Class names from a column of labels: one spelling each, and no column that has no classes.

The rules. White space around a label is dropped, and so is the ``.0`` of a whole number, so that
``a `` is ``a`` and ``1.0`` is ``1``. Labels that then differ only in case, in inner white space or
in how the same number is written are refused, unless ``dataset.label_names`` lists them. So are
labels of several types, and what is no text, whole number or truth value. Fractions are classes
while they are few.
"""

import math
import re
import unicodedata
from collections.abc import Collection, Iterable
from decimal import Decimal
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hafl_app.data.errors import DataError

if TYPE_CHECKING:
    import pandas as pd  # slow to import, and class names are compared without any table, too

MOST_FRACTIONS: Final = 20
"""Different labels of a column with fractions; more are measurements, not classes."""

FEWEST_ROWS: Final = 50
"""Rows from which on labels that hardly repeat are taken for those of a wrong column."""

_REPEAT_RATIO: Final = 0.9
_WHOLE: Final = re.compile(r"([+-]?[0-9]+)\.0+")
_NUMBER: Final = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)")
_LONGEST_SHOWN = 30


def normal_name(name: str) -> str:
    """Return a label's one spelling: no white space around it, no ``.0`` of a whole number."""
    bare = name.strip()
    whole = _WHOLE.fullmatch(bare)
    return whole[1] if whole else bare


def normal_labels(
    column: "pd.Series[Any]", what: str, listed: Collection[str] = ()
) -> tuple["pd.Series[Any]", list[str]]:
    """Return the class of every row by name, and in words what was changed.

    Parameters
    ----------
    column
        The labels, none null.
    what
        File and column, for messages.
    listed
        Names that may differ as little as they like.

    Raises
    ------
    DataError
        If a label is blank or no name of a class, or two mean the same; see the module's rules.
    """
    values = column.astype(object)
    _refuse_kinds(values, what)
    written = values.map(_written)
    names = written.map(normal_name)
    if (blank := (names == "").to_numpy()).any():
        raise DataError(f"{what} is blank in row {blank.argmax() + 1}; give it a value")
    _refuse_alike(names.unique(), what, {normal_name(name) for name in listed})
    return names, _changes(written, names, what)


def class_fault(labels: "pd.Series[Any]") -> str:
    """Return the fault of a column of class names, without quoting any; empty if there is none."""
    names = labels.unique()
    numbers = [_NUMBER.fullmatch(name) for name in names]
    if all(numbers) and len(names) > MOST_FRACTIONS and any("." in name for name in names):
        return (
            f"{len(names)} different numbers with fractions, expected classes, at most "
            f"{MOST_FRACTIONS} where they are fractions"
        )
    if len(labels) >= FEWEST_ROWS and len(names) > _REPEAT_RATIO * len(labels):
        return f"{len(names)} different labels in {len(labels)} rows, expected classes that repeat"
    return ""


def sorted_label_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort label names: by value if all are integers, else alphabetically."""
    names = set(labels)
    try:
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(names))


def alike(names: Iterable[str]) -> tuple[str, str] | None:
    """Find two different names that differ only in case, inner white space or as numbers do."""
    found: dict[Any, str] = {}
    for name in names:
        other = found.setdefault(comparable_name(name), name)
        if other != name:
            return other, name
    return None


def comparable_name(name: str) -> Any:
    """Normalize a name so that names that differ too little to be two classes become equal."""
    if _NUMBER.fullmatch(name):
        return Decimal(name)
    return unicodedata.normalize("NFC", " ".join(name.split())).casefold()


def _refuse_alike(names: Iterable[str], what: str, listed: Collection[str]) -> None:
    pair = alike(name for name in names if name not in listed)
    if pair is not None:
        first, second = (repr(name[:_LONGEST_SHOWN]) for name in pair)
        raise DataError(
            f"{what} has {first} and {second}, which look like one class; write them alike, or "
            "list both in dataset.label_names"
        )


def _refuse_kinds(values: "pd.Series[Any]", what: str) -> None:
    kinds = values.map(_kind).to_numpy()
    unfit = np.flatnonzero(~np.isin(kinds, ["text", "number", "truth value"]))
    if len(unfit):
        raise DataError(
            f"{what} holds a value of type {kinds[unfit[0]]} in row {unfit[0] + 1}; expected text "
            "or a whole number"
        )
    others = np.flatnonzero(kinds != kinds[0])
    if len(others):
        raise DataError(
            f"{what} mixes types: {kinds[0]} in row 1, {kinds[others[0]]} in row {others[0] + 1}"
        )


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, (bool, np.bool_)):
        return "truth value"
    if isinstance(value, Integral):
        return "number"
    if isinstance(value, Real):
        return "number" if math.isfinite(value) else "infinite number"
    return {dict: "object", np.ndarray: "list"}.get(type(value), type(value).__name__)


def _written(value: Any) -> str:
    # A column of integers turns into floats on its way through pandas when a value was missing.
    is_whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if is_whole else str(value)


def _changes(written: "pd.Series[Any]", names: "pd.Series[Any]", what: str) -> list[str]:
    """Describe the labels that were given another spelling, with their number."""
    bare = written.map(str.strip)
    counts = {
        "white space around the label is dropped": (written != bare).sum(),
        "the '.0' of a whole number is dropped": (bare != names).sum(),
    }
    return [
        f"{what}: {change} in {count} {'row' if count == 1 else 'rows'}"
        for change, count in counts.items()
        if count
    ]
