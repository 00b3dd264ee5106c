"""Text of a file: decompressed, UTF-8, and no other encoding taken for it."""

import bz2
import gzip
import lzma
import shlex
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from hafl_app.data.errors import DataError

FORMATS: Final = (".csv", ".tsv", ".txt", ".jsonl", ".json", ".parquet")
"""Suffixes of the tables that are read."""

OPEN_COMPRESSED: Final[dict[str, Callable[..., Any]]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}

READ_ERRORS: Final = (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError)
"""Errors that opening, decompressing and decoding raise."""

_MARKS: Final = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_CONTAINERS: Final = {
    b"\x1f\x8b": "gzip data: its name should end in .gz",
    b"BZh": "bzip2 data: its name should end in .bz2",
    b"\xfd7zXZ": "xz data: its name should end in .xz",
    b"PK\x03\x04": "a zip archive or a spreadsheet: export it as csv",
    b"PAR1": "parquet: its name should end in .parquet",
}
_LOOKED_AT = 4096  # bytes, to detect UTF-16 without a mark
_WIDE_SHARE = 0.2  # of bytes that are zero; text in UTF-8 has none


def format_of(path: Path) -> str:
    """Return the suffix of a file's format, looking through a compression suffix."""
    inner = path.with_suffix("") if path.suffix.lower() in OPEN_COMPRESSED else path
    return inner.suffix.lower()


def read_text(path: Path) -> str:
    """Read a whole text file, without a byte order mark.

    Parameters
    ----------
    path
        UTF-8; compressed if it ends in .gz, .bz2 or .xz.

    Raises
    ------
    DataError
        If it is compressed otherwise, of another encoding, which is named with the way to convert
        it, or has a NUL byte.
    OSError, EOFError, zlib.error, lzma.LZMAError
        If it cannot be opened or decompressed.
    """
    opener = OPEN_COMPRESSED.get(path.suffix.lower(), open)
    with opener(path, "rb") as file:
        data: bytes = file.read()
    for start, what in _CONTAINERS.items():
        if data.startswith(start):
            raise DataError(f"{path} is {what}")
    if encoding := _wide_encoding(data):
        raise DataError(f"{path} is {encoding}, expected UTF-8; {_conversion(path, encoding)}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(path, data, error.start)) from error
    if "\0" in text:
        line = _line_of(data, data.index(b"\0"))
        raise DataError(f"{path}, line {line}: a NUL byte, which no text file has")
    return text


def _wide_encoding(data: bytes) -> str:
    """Name an encoding of two or four bytes a character; empty if it is none."""
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            return encoding
    start = data[:_LOOKED_AT]
    if start.count(0) <= _WIDE_SHARE * len(start):
        return ""
    return "UTF-16LE" if start[1::2].count(0) > start[::2].count(0) else "UTF-16BE"


def _not_utf8(path: Path, data: bytes, at: int) -> str:
    windows = any(0x80 <= byte < 0xA0 for byte in data)
    name, encoding = ("Windows-1252", "CP1252") if windows else ("Latin-1", "LATIN1")
    return (
        f"{path}, line {_line_of(data, at)}: byte 0x{data[at]:02X} is not UTF-8; if the file is "
        f"{name}, {_conversion(path, encoding)}"
    )


def _conversion(path: Path, encoding: str) -> str:
    packed = path.suffix.lower() in OPEN_COMPRESSED
    plain = path.with_suffix("") if packed else path
    new = plain.with_stem(f"{plain.stem}-utf8")
    unpacked = "unpack it and " if packed else ""
    return (
        f"{unpacked}convert it: iconv -f {encoding} -t utf-8 {shlex.quote(plain.name)} > "
        f"{shlex.quote(new.name)}"
    )


def _line_of(data: bytes, at: int) -> int:
    return data.count(b"\n", 0, at) + 1
