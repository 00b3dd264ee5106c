"""Tables from csv, tsv, jsonl, json and parquet files, compressed or not.

Files are read straight into memory: `datasets.load_dataset` would write a copy into a cache and
lock it, which is slower and gets in the way when many clients start at once.
"""

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any, Final

import pandas as pd

from hafl_app.data.errors import DataError

FORMATS: Final = (".csv", ".tsv", ".jsonl", ".json", ".parquet")

_OPEN_COMPRESSED: Final[dict[str, Callable[..., Any]]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}


def format_of(path: Path) -> str:
    """Return the suffix of a file's format, looking through a compression suffix."""
    inner = path.with_suffix("") if path.suffix.lower() in _OPEN_COMPRESSED else path
    return inner.suffix.lower()


def read_table(path: Path, string_columns: Collection[str]) -> pd.DataFrame:
    """Read one file, one row per example.

    Parameters
    ----------
    path
        A file in one of `FORMATS`; any but parquet may end in .gz, .bz2 or .xz as well.
    string_columns
        Columns of a csv file to take as they are written; the types of others are inferred.

    Raises
    ------
    DataError
        If the format is not known or the file cannot be read as such.
    """
    kind = format_of(path)
    if kind not in FORMATS:
        raise DataError(f"{path} is of no known format; expected one of {', '.join(FORMATS)}")
    try:
        if kind == ".parquet":
            return pd.read_parquet(path)
        with _open_text(path) as file:
            if kind in (".csv", ".tsv"):
                return _read_csv(file, "\t" if kind == ".tsv" else ",", string_columns)
            return pd.DataFrame(_read_json(file, path))
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"cannot read {path} as {kind[1:]}: {error}".replace("\n", " ")) from error


def _open_text(path: Path) -> IO[str]:
    opener = _OPEN_COMPRESSED.get(path.suffix.lower(), open)
    file: IO[str] = opener(path, "rt", encoding="utf-8-sig", newline="")
    return file


def _read_csv(file: IO[str], separator: str, string_columns: Collection[str]) -> pd.DataFrame:
    try:
        return pd.read_csv(
            file,
            sep=separator,
            dtype=dict.fromkeys(string_columns, str),
            # Only an empty field is null: "None" and "NA" are words that a text may consist of.
            keep_default_na=False,
            na_values=[""],
            low_memory=False,
        )
    except pd.errors.EmptyDataError:
        return pd.DataFrame()


def _read_json(file: IO[str], path: Path) -> list[dict[str, Any]]:
    """Read a list of objects, or one object per line; .json files come as either."""
    text = file.read()
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        lines = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
        rows = [_parse_line(line, number, path) for number, line in lines]
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of objects or one object per line")
    return rows  # type: ignore[no-any-return]


def _parse_line(line: str, number: int, path: Path) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number}: not a JSON object ({error})") from error


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
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"cannot read {path} as json: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: expected a list of label names")
    return tuple(names)
