"""Prompts from the columns of a table."""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from hafl_app.data.errors import DataError, require_column

if TYPE_CHECKING:
    import pandas as pd  # slow to import, and settings are checked without any table

_COLUMN: Final = re.compile(r"\{(\w+)\}")  # not str.format, which would follow attributes
_BETWEEN_PARAGRAPHS: Final = "\n\n"


def columns_of(template: str) -> list[str]:
    """Return the columns that a template names, each once, in order.

    Raises
    ------
    DataError
        If it names none.
    """
    names = list(dict.fromkeys(_COLUMN.findall(template)))
    if not names:
        raise DataError(f"dataset.template: {template!r} names no column, such as {{instruction}}")
    return names


def refuse_answer_in(template: str, answer_column: str) -> None:
    """Refuse a template whose prompt would hold what is to be learned.

    Raises
    ------
    DataError
        If it names the answer's column, or none at all.
    """
    if answer_column in columns_of(template):
        raise DataError(
            f"dataset.template names {{{answer_column}}}, the answer column: the prompt would hold "
            "what is to be learned"
        )


def render(template: str, row: Mapping[str, Any]) -> str:
    """Fill a template with a row's values.

    A paragraph (what stands between empty lines) is left out where all columns that it names are
    blank: without an input there is no heading of one.

    Parameters
    ----------
    template
        Text with ``{column}`` in it.
    row
        Column to value; text, or nothing.
    """

    def value(match: re.Match[str]) -> str:
        return _text(row[match[1]])

    kept = []
    for paragraph in template.split(_BETWEEN_PARAGRAPHS):
        names = _COLUMN.findall(paragraph)
        if not names or any(_text(row[name]).strip() for name in names):
            kept.append(_COLUMN.sub(value, paragraph))
    return _BETWEEN_PARAGRAPHS.join(kept)


def filled(template: str, text: str) -> str:
    """Return the prompt of a text alone: in the template's first column, the others blank.

    Raises
    ------
    DataError
        If the template names no column.
    """
    first, *others = columns_of(template)
    return render(template, {first: text, **dict.fromkeys(others, "")})


def prompts(table: "pd.DataFrame", template: str, origin: str) -> list[str]:
    """Return the prompt of every row.

    Raises
    ------
    DataError
        If the table has no column that the template names, or the template has one in braces that
        is no word, such as ``{my column}``.
    """
    names = columns_of(template)
    for name in map(str, table.columns):
        if name not in names and f"{{{name}}}" in template:
            raise DataError(
                f"dataset.template: {{{name}}} is not put in; rename the column of {origin} to "
                "letters, digits and underscores"
            )
    for name in names:
        require_column(table.columns, name, "dataset.template", origin)
    values = zip(*(table[name] for name in names), strict=True)
    return [render(template, dict(zip(names, row, strict=True))) for row in values]


def is_missing(value: Any) -> bool:
    """Whether a cell of a table holds nothing."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(value: Any) -> str:
    return "" if is_missing(value) else str(value)
