"""Tables from csv, tsv, txt, jsonl, json and parquet files, compressed or not.

Files are read straight into memory: `datasets.load_dataset` would write a copy into a cache and
lock it, which is slower and gets in the way when many clients start at once.
"""

from collections.abc import Collection
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from hafl_app.data.decoding import FORMATS, READ_ERRORS, format_of, read_text
from hafl_app.data.delimited import read_delimited, read_lines
from hafl_app.data.errors import DataError
from hafl_app.data.json_rows import parse, read_json_rows


def read_table(path: Path, string_columns: Collection[str], label_column: str = "") -> pd.DataFrame:
    """Read one file, one row per example.

    A csv or tsv file has a header. A txt file has none: each line is ``label<TAB>text``.

    Parameters
    ----------
    path
        A file in one of `FORMATS`; any but parquet may end in .gz, .bz2 or .xz as well.
    string_columns
        Columns of a csv or tsv file to take as they are written, see
        `hafl_app.data.delimited.read_delimited`.
    label_column
        Where the label stands, if the rows have one.

    Raises
    ------
    DataError
        If the format is not known, the file cannot be read as such, or rows would be lost or
        shifted.
    """
    kind = format_of(path)
    if kind not in FORMATS:
        raise DataError(f"{path} is of no known format; expected one of {', '.join(FORMATS)}")
    try:
        if kind == ".parquet":
            return _read_parquet(path)
        text = read_text(path)
        if kind in (".csv", ".tsv"):
            separator = "\t" if kind == ".tsv" else ","
            return read_delimited(text, separator, str(path), string_columns, label_column)
        if kind == ".txt":
            return read_lines(text, str(path))
        # As objects: with a null among them pandas would make floats of ints, and two ids one.
        return pd.DataFrame(read_json_rows(text, str(path)), dtype=object)
    except DataError:
        raise
    except (*READ_ERRORS, pa.ArrowException) as error:
        raise DataError(f"cannot read {path} as {kind[1:]}: {_one_line(error)}") from error


def _read_parquet(path: Path) -> pd.DataFrame:
    # Not through a dataset, which would take columns from the names of folders.
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{path}: {names.count(twice)} columns are named {twice[:30]!r}")
        table = file.read()
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True, integer_object_nulls=True)
    return frame


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def read_names(path: Path) -> tuple[str, ...]:
    """Read a JSON list of label names; none if there is no such file.

    Raises
    ------
    DataError
        If the file is not such a list.
    """
    if not path.exists():
        return ()
    try:
        names = parse(read_text(path), str(path))
    except OSError as error:
        raise DataError(f"cannot read {path} as json: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: expected a list of label names")
    return tuple(names)
