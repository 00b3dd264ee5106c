"""Rows of json and jsonl files."""

import json
from collections.abc import Iterable
from typing import Any

from hafl_app.data.errors import DataError


def read_json_rows(text: str, origin: str) -> list[dict[str, Any]]:
    """Read a list of objects, or one object a line; .json files come as either.

    Raises
    ------
    DataError
        If it is neither, an object names a key twice, or it is nested too deep.
    """
    if text.lstrip().startswith("["):
        rows = parse(text, origin)
        places = [f"{origin}, row {number}" for number in range(1, len(rows) + 1)]
    else:
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        places = [f"{origin}, line {number}" for number, _ in lines]
        rows = [
            parse(line, place, "a JSON object")
            for (_, line), place in zip(lines, places, strict=True)
        ]
    for row, place in zip(rows, places, strict=True):
        if not isinstance(row, dict):
            raise DataError(
                f"{place}: {type(row).__name__}, expected a list of objects or one object a line"
            )
    return rows  # type: ignore[no-any-return]


def parse(text: str, place: str, expected: str = "JSON") -> Any:
    """Parse JSON in which no object has a key twice: of two values one would be lost.

    Raises
    ------
    DataError
        If it is not that.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not {expected} ({error})") from error


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    members = list(pairs)
    found = dict(members)
    if len(found) < len(members):
        keys = [key for key, _ in members]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:30]!r} stands twice in an object")
    return found
