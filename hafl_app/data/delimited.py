"""Rows of csv, tsv and txt files, none of them lost or shifted without a word."""

import csv
import io
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import pandas as pd

from hafl_app.data.errors import DataError

LONGEST_CELL: Final = 16 * 2**20
"""Characters of a cell; a longer one is a sign of a quote that is never closed."""

TXT_COLUMNS: Final = ("label", "text")
"""Columns before and after the tab of a line of a txt file."""

_WHOLE: Final = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_FEWEST_LINES = 3  # that look like rows, where no label shows which are
_SEPARATORS = ",;\t|"
_LONGEST_NAME = 30


class _Record(NamedTuple):
    """A row, with the first and the last line that it stands on, from 1."""

    cells: list[str]
    first: int
    last: int


def read_delimited(
    text: str,
    separator: str,
    origin: str,
    string_columns: Collection[str] = (),
    label_column: str = "",
) -> pd.DataFrame:
    """Read rows under a header, in the strict reading of RFC 4180; blank lines are none.

    An empty cell is null. A column of whole numbers becomes one of ints, unless it is among
    ``string_columns``; every other is text, as it is written.

    Parameters
    ----------
    text
        All of the file.
    separator
        Between cells, one character.
    origin
        The file, for messages.
    string_columns
        Columns that stay text.
    label_column
        By which rows are recognized that a stray quote has made part of a cell.

    Raises
    ------
    DataError
        If a row has more or fewer cells than the header, a column name occurs twice, a quote is
        never closed or followed by text, or a quoted cell has swallowed rows.
    """
    lines = list(io.StringIO(text, newline=""))
    records = _records(lines, separator, origin)
    header = next(records, None)
    if header is None:
        return pd.DataFrame()
    names = _column_names(header, separator, origin)
    rows: list[_Record] = []
    for number, record in enumerate(records, 1):
        if len(record.cells) != len(names):
            raise DataError(
                f"{origin}, line {record.first}: row {number} has {len(record.cells)} "
                f"{_fields(len(record.cells))}, the header has {len(names)}{_remedy(record, names)}"
            )
        rows.append(record)
    _refuse_swallowed(rows, names, lines, separator, origin, label_column)
    columns = zip(*(row.cells for row in rows), strict=True) if rows else [()] * len(names)
    return pd.DataFrame(
        {
            name: _typed(cells, as_text=name in string_columns)
            for name, cells in zip(names, columns, strict=True)
        }
    )


def read_lines(text: str, origin: str) -> pd.DataFrame:
    """Read ``label<TAB>text``, one example a line; a first line of these two words is a header.

    Raises
    ------
    DataError
        If a line has no tab or several.
    """
    rows: list[list[str | None]] = []
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        cells = line.removesuffix("\n").split("\t")
        if not line.strip() or (not rows and tuple(cells) == TXT_COLUMNS):
            continue
        if len(cells) != len(TXT_COLUMNS):
            raise DataError(
                f"{origin}, line {number}: {len(cells) - 1} tabs, expected one: label<TAB>text"
            )
        rows.append([cell or None for cell in cells])
    return pd.DataFrame(rows, columns=list(TXT_COLUMNS), dtype=object)


def _records(lines: Sequence[str], separator: str, origin: str) -> Iterator[_Record]:
    with _long_cells():
        reader = csv.reader(iter(lines), delimiter=separator, strict=True)
        while True:
            first = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DataError(
                    f"{origin}, line {first}: {_reason(error)}; a double quote inside a quoted "
                    'field is written twice ("")'
                ) from error
            if cells is None:
                return
            if len(cells) > 1 or "".join(cells).strip():
                yield _Record(cells, first, reader.line_num)


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _reason(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return "a double quote opens a field that is never closed"
    if "field larger" in str(error):
        return f"a field of more than {LONGEST_CELL} characters"
    return f"a stray double quote ({error})"


def _column_names(header: _Record, separator: str, origin: str) -> list[str]:
    """Name every column; one without a name, such as an index, by its place."""
    if header.last > header.first:
        raise DataError(
            f"{origin}, line {header.first}: the header runs to line {header.last}; a stray "
            "double quote?"
        )
    cells = header.cells
    others = [mark for mark in _SEPARATORS if mark != separator and mark in cells[0]]
    if len(cells) == 1 and others:
        raise DataError(
            f"{origin}: one column, {cells[0][:_LONGEST_NAME]!r}; fields are separated by "
            f"{separator!r}, not by {others[0]!r} (.csv: comma, .tsv: tab)"
        )
    names = [(cell.strip() and cell) or f"Unnamed: {place}" for place, cell in enumerate(cells)]
    for name, count in Counter(names).items():
        if count > 1:
            raise DataError(f"{origin}: {count} columns are named {name[:_LONGEST_NAME]!r}")
    return names


def _refuse_swallowed(
    rows: Sequence[_Record],
    names: Sequence[str],
    lines: Sequence[str],
    separator: str,
    origin: str,
    label_column: str,
) -> None:
    """Refuse a field over several lines of which two or more could be rows by themselves.

    A stray quote ends at the next one. What it opens may well be a legal field, but its lines
    have as many fields as the header and a label that occurs, which no more than one line of a row
    should have. Without labels, a few lines and nothing but such lines are as clear a sign.
    """
    place = names.index(label_column) if label_column in names else None
    labels = set() if place is None else {_bare(row.cells[place]) for row in rows} - {""}
    for row in rows:
        if row.last == row.first or len(names) < 2:
            continue
        held = lines[row.first - 1 : row.last]
        split = [line.rstrip("\r\n").split(separator) for line in held]
        alike = [cells for cells in split if len(cells) == len(names)]
        if place is None:
            bad = len(alike) == len(held) >= _FEWEST_LINES
        else:
            bad = sum(_bare(cells[place]) in labels for cells in alike) >= 2
        if bad:
            raise DataError(
                f"{origin}, line {row.first}: a quoted field runs to line {row.last} and holds "
                f"lines that look like rows; a stray double quote? If the field is right, write "
                "the file as jsonl"
            )


def _bare(cell: str) -> str:
    return cell.strip().strip('"').strip()


def _typed(cells: Sequence[str], *, as_text: bool) -> "pd.Series[Any]":
    values: list[object] = [cell or None for cell in cells]
    given = [cell for cell in cells if cell]
    if given and not as_text and all(_WHOLE.fullmatch(cell) for cell in given):
        values = [int(cell) if cell else None for cell in cells]
    return pd.Series(values, dtype=object)


def _remedy(record: _Record, names: Sequence[str]) -> str:
    if len(record.cells) < len(names):
        return ""
    return "; a field with the separator in it needs double quotes around it"


def _fields(count: int) -> str:
    return "field" if count == 1 else "fields"
