"""Checksums of a base model's files."""

import functools
import hashlib
from pathlib import Path


class ModelError(ValueError):
    """A base model that is not there, or not the one that was asked for."""


def check_sha256(file: Path, expected: str) -> None:
    """Reject a file of other bytes than expected.

    Raises
    ------
    ModelError
        In one line, without the folder: on a node this reason goes to the server.
    """
    if not file.is_file():
        raise ModelError(f"the base model has no {file.name}, whose SHA-256 should be {expected}")
    if (found := sha256_of(file)) != expected:
        raise ModelError(f"{file.name} of the base model has SHA-256 {found}, expected {expected}")


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; read again only if its size or time changed."""
    facts = file.stat()
    return _sha256(file, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _sha256(file: Path, _size: int, _time: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
