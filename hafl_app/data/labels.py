"""Names of classes: which are allowed, and which of a node are not among the run's."""

import logging
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

from hafl_app.data.errors import DataError
from hafl_app.data.label_rules import alike, sorted_label_names

logger = logging.getLogger(__name__)

_LONGEST_SHOWN = 30
MOST_LABELS: Final = 10_000
LONGEST_LABEL: Final = 200
"""Limits of a label set, in names and in characters of each.

They hold for other nodes, whose lists decide the size of the head, and for a node's own file, where
more is a sign of the wrong column.
"""


def label_fault(names: Collection[Any]) -> str:
    """Return the fault of a list of label names, without quoting any; empty if there is none.

    Names are printable text of 1 to `LONGEST_LABEL` characters, at most `MOST_LABELS` of them,
    none twice.
    """
    if len(names) > MOST_LABELS:
        return f"{len(names)} label names, expected at most {MOST_LABELS}"
    if not all(isinstance(name, str) for name in names):
        return "a label name is not text"
    if longest := max((len(name) for name in names if len(name) > LONGEST_LABEL), default=0):
        return f"a label name of {longest} characters, expected at most {LONGEST_LABEL}"
    if not all(name.strip() and not any(map(_is_control, name)) for name in names):
        return "a label name is blank or has control characters"
    if len(set(names)) < len(names):
        return "label names are repeated"
    return ""


def checked_label_names(names: Sequence[Any], origin: str) -> tuple[str, ...]:
    """Return label names that a classifier can have.

    Raises
    ------
    DataError
        If `label_fault` finds something, or they are fewer than two.
    """
    if fault := label_fault(names):
        raise DataError(f"{origin}: {fault}")
    if len(names) < 2:
        raise DataError(f"{origin}: {len(names)} label names, expected at least 2")
    return tuple(names)


def union_of_labels(lists: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """Return every name that occurs, sorted; the order of the lists does not matter.

    Names that differ only in how they are written are two classes, with a warning.

    Raises
    ------
    DataError
        If there are fewer than two, or more than `MOST_LABELS`.
    """
    names = sorted_label_names({name for names in lists for name in names})
    if pair := alike(names):
        # One node's spelling must not stop the others, so it is no error here.
        first, second = (repr(name[:_LONGEST_SHOWN]) for name in pair)
        logger.warning("labels %s and %s of different nodes look like one class", first, second)
    return checked_label_names(names, "dataset.label_names=null, so all that the nodes have")


def _is_control(character: str) -> bool:
    # Lone surrogates as well: they cannot be written as UTF-8.
    return unicodedata.category(character) in {"Cc", "Cs"}
