"""Details of a run: each client's scores, the components' importance, and watched answers.

They stand beside the records, in a file of their own, since no tracker but the folder takes them.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from hafl_app.disk import naming
from hafl_app.tracking.jsonl import replace_file

DETAILS_FILE: Final = "details.jsonl"
SCORES: Final = "scores"
IMPORTANCE: Final = "importance"
ANSWERS: Final = "answers"


class DetailsFile:
    """``details.jsonl`` in a run's folder, one JSON line a record; written round by round.

    Parameters
    ----------
    folder
        Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / DETAILS_FILE

    def start(self, last_round: int) -> None:
        """Keep the records up to a round; -1 keeps none, and there need not be any.

        Raises
        ------
        OSError
            If the disk does not take what is kept.
        """
        if not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _round_of(line) <= last_round]
        replace_file(self._path, "".join(f"{line}\n" for line in kept))

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Return the records of one kind that are kept, see `start`."""
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [record for line in lines if (record := json.loads(line)).get("kind") == kind]

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records.

        Raises
        ------
        OSError
            If the disk does not take them.
        """
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        if text:
            with naming(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(text)


def score_record(
    server_round: int,
    partition_id: int,
    rank: int,
    num_examples: int,
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    """Return the record of one client's scores, of its slice on its held-out rows.

    Parameters
    ----------
    num_examples
        Rows, as the client states it.
    metrics
        By name, without a phase.
    """
    return {
        "kind": SCORES,
        "server_round": server_round,
        "partition_id": partition_id,
        "rank": rank,
        "num_examples": num_examples,
        "metrics": {n: value if math.isfinite(value) else None for n, value in metrics.items()},
    }


def importance_record(
    server_round: int, measure: str, modules: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Return the record of the components' importance after a round.

    Parameters
    ----------
    measure
        What the numbers are, see `hafl_app.lowrank.importance`.
    modules
        Module name to one number a component; NaN where none was measured yet.
    """
    rounded = {name: [_rounded(value) for value in values] for name, values in modules.items()}
    return {
        "kind": IMPORTANCE,
        "server_round": server_round,
        "measure": measure,
        "modules": rounded,
    }


def answers_record(server_round: int, answers: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Return the record of what the global adapter answered after a round.

    Parameters
    ----------
    answers
        Each with ``prompt``, ``expected``, ``category`` and ``answer``.
    """
    return {"kind": ANSWERS, "server_round": server_round, "answers": [dict(a) for a in answers]}


def _rounded(value: float) -> float | None:
    """Return a value with four digits, which is more than a figure shows; None if it has none."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _round_of(line: str) -> float:
    try:
        return int(json.loads(line)["server_round"])
    except (ValueError, TypeError, KeyError):
        return math.inf
