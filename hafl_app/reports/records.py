"""A run's folder as plain values: what every reader of one starts from.

Standard library only, so that a wrong folder is answered at once.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from hafl_app.tracking.details import DETAILS_FILE
from hafl_app.tracking.jsonl import METRICS_FILE, SUMMARY_FILE

ROUND: Final = "round"
CLIENT: Final = "client"


class UnreadableRunError(ValueError):
    """A folder that no run's records can be read from; the message is one line."""


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Read all records of ``metrics.jsonl``, at least one round among them.

    Half a line at the end, where a run was killed while it wrote, is left out.

    Raises
    ------
    UnreadableRunError
        If there is no such file, it holds something else, or no round.
    """
    records = _read_lines(folder / METRICS_FILE)
    if not any(record["kind"] == ROUND for record in records):
        raise UnreadableRunError(f"{folder}: {METRICS_FILE} has no round")
    return records


def read_details(folder: Path) -> list[dict[str, Any]]:
    """Read all records of ``details.jsonl``; none of a run that has no such file.

    Raises
    ------
    UnreadableRunError
        If the file holds something else.
    """
    return _read_lines(folder / DETAILS_FILE) if (folder / DETAILS_FILE).exists() else []


def rounds_of(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records that are of rounds."""
    return [record for record in records if record["kind"] == ROUND]


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the summary in a folder; empty if there is none that can be read."""
    try:
        found = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UnreadableRunError(f"{path.parent}: no readable {path.name}: {error}") from error
    records = []
    for number, text in enumerate(lines, start=1):
        try:
            record = json.loads(text)
            record["kind"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number == len(lines) > 1:
                break
            raise UnreadableRunError(
                f"{path.parent}: no readable {path.name}: line {number} is no record of a run"
            ) from error
        records.append(record)
    return records
