"""The run as files: one JSON line a record while it goes, one summary when it ends."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TextIO

from hafl_app.disk import naming
from hafl_app.tracking.base import (
    FAILED,
    NO_HISTORY,
    ClientRecord,
    ClientRow,
    History,
    RoundRecord,
)

METRICS_FILE, SUMMARY_FILE, CLIENTS_FILE = "metrics.jsonl", "summary.json", "clients.json"
_OF_A_CLOCK = ("flops", "simulated_seconds")  # left out of the lines of a run without one


class JsonlTracker:
    """Write ``metrics.jsonl`` and ``summary.json`` into a folder.

    Each line is flushed, so a killed run keeps all its lines. A line holds the fields of a
    `RoundRecord` with ``"kind": "round"``, or of a `ClientRecord` with ``"kind": "client"``.
    NaN and infinities, which JSON does not have, become null; without simulated devices there are
    no lines about their time. A later run in the same folder
    replaces the files of the earlier one; one that goes on keeps the lines of its history.

    Parameters
    ----------
    folder
        Where to write; made when it is not there.

    Raises
    ------
    OSError
        From every method, when the disk does not take what is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: TextIO | None = None

    def start(
        self,
        settings: Mapping[str, Any],
        clients: Sequence[ClientRow],
        history: History = NO_HISTORY,
    ) -> None:
        """Open ``metrics.jsonl`` with the history's lines, and remove an earlier summary."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / SUMMARY_FILE).unlink(missing_ok=True)
        path = self._folder / METRICS_FILE
        lines = [*map(_line, history.clients), *map(_line, history.rounds)]
        if lines:
            # In the order in which they were logged: the clients of a round, then the round.
            lines.sort(key=lambda line: line["server_round"])
            replace_file(path, "".join(_text(line) for line in lines))
        self._file = path.open("a" if lines else "w", encoding="utf-8")

    def log_round(self, record: RoundRecord) -> None:
        """Write one line."""
        self._write(_line(record))

    def log_client(self, record: ClientRecord) -> None:
        """Write one line."""
        self._write(_line(record))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``: the summary, and ``"status": "finished"``."""
        self._end({"status": "finished", **summary})

    def fail(self, reason: str, status: str = FAILED) -> None:
        """Write ``summary.json``: the status and the reason."""
        self._end({"status": status, "reason": reason})

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            raise RuntimeError(f"{self._folder}: a record came before start or after the end")
        with naming(self._folder / METRICS_FILE):
            self._file.write(_text(line))
            self._file.flush()

    def _end(self, summary: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_plain(summary), indent=2, sort_keys=True, allow_nan=False)
        replace_file(self._folder / SUMMARY_FILE, text + "\n")
        if self._file is not None:
            with naming(self._folder / METRICS_FILE):
                self._file.close()
            self._file = None


def read_history(folder: Path, last_round: int) -> History:
    """Read a run's records up to ``last_round``; later ones do not count.

    Raises
    ------
    OSError, ValueError
        If ``metrics.jsonl`` is not there, or a line before the last cannot be read.
    """
    history: dict[str, list[Any]] = {"round": [], "client": []}
    kinds = {"round": RoundRecord, "client": ClientRecord}
    lines = (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            kind = line.pop("kind")
            record = kinds[kind](**{k: math.nan if v is None else v for k, v in line.items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):
                break  # the run was killed while it wrote this
            raise ValueError(f"{folder / METRICS_FILE}, line {number}: {error}") from error
        if record.server_round <= last_round:
            history[kind].append(record)
    return History(history["round"], history["client"])


def _line(record: RoundRecord | ClientRecord) -> dict[str, Any]:
    kind = "round" if isinstance(record, RoundRecord) else "client"
    values = vars(record).items()
    return {"kind": kind, **{k: v for k, v in values if k not in _OF_A_CLOCK or math.isfinite(v)}}


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(_plain(line), allow_nan=False) + "\n"


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path), temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Turn a value into what JSON has; NumPy's scalars are `numbers` too."""
    match value:
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case bool() | Integral():
            return value if isinstance(value, bool) else int(value)
        case Real():
            return float(value) if math.isfinite(value) else None
        case os.PathLike():
            return os.fspath(value)
        case _:
            return value
