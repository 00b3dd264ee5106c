"""Records of a run, read on from where the last look ended; damaged lines are named."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from hafl_app.dashboard.folders import FolderError, Root
from hafl_app.tracking.base import ClientRecord, RoundRecord
from hafl_app.tracking.details import ANSWERS, IMPORTANCE

_MOST_FAULTS = 3
Record = TypeVar("Record", RoundRecord, ClientRecord)


@dataclass(frozen=True)
class Importance:
    """Importance of the components after a round.

    Attributes
    ----------
    measure
        What the numbers are.
    modules
        Module name to a number a component; NaN where none was measured.
    """

    server_round: int
    measure: str
    modules: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Answer:
    """A watched prompt and its answer; ``expected`` is the data's own, empty if it has none."""

    prompt: str
    expected: str
    answer: str


@dataclass(frozen=True)
class Answers:
    """Answers to the watched prompts after a round."""

    server_round: int
    answers: Sequence[Answer]


@dataclass
class Records:
    """What has been read of one file so far.

    Attributes
    ----------
    rounds, clients, importance
        Records in the order of the file.
    answers
        The last ones to the watched prompts; None before the first.
    faults
        A line for each of the first damaged ones.
    is_cut
        Whether the last line has no end, as while it is written.
    """

    rounds: list[RoundRecord] = field(default_factory=list)
    clients: list[ClientRecord] = field(default_factory=list)
    importance: list[Importance] = field(default_factory=list)
    answers: Answers | None = None
    faults: list[str] = field(default_factory=list)
    is_cut: bool = False
    _inode: int = -1
    _offset: int = 0
    _line: int = 0

    def read_on(self, root: Root, file: Path) -> None:
        """Read what was added to a file; another file of that name is read from its start.

        A last line without an end is left for the next time.

        Raises
        ------
        FolderError
            If the file cannot be read.
        """
        with root.open(file) as opened:
            status = os.fstat(opened.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self.rounds, self.clients, self.importance, self.faults = [], [], [], []
                self.answers = None
                self._inode, self._offset, self._line = status.st_ino, 0, 0
            if status.st_size == self._offset:
                return
            opened.seek(self._offset)
            added = opened.read(status.st_size - self._offset)
        whole, end, rest = added.rpartition(b"\n")
        self.is_cut = bool(rest)
        self._offset += len(whole) + len(end)
        for line in whole.split(b"\n") if end else ():
            self._line += 1
            self._add(line, file.name)

    def _add(self, line: bytes, name: str) -> None:
        try:
            read = json.loads(line)
            kind = read["kind"]
            if kind == "round":
                self.rounds.append(_record(RoundRecord, read))
            elif kind == "client":
                self.clients.append(_record(ClientRecord, read))
            elif kind == IMPORTANCE:
                self.importance.append(_importance(read))
            elif kind == ANSWERS:
                self.answers = _answers(read)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if len(self.faults) < _MOST_FAULTS:
                self.faults.append(f"{name}, line {self._line}: not a record, left out")


def read_json(root: Root, file: Path) -> dict[str, Any]:
    """Return an object of JSON.

    Raises
    ------
    FolderError
        If the file cannot be read, or holds none.
    """
    with root.open(file) as opened:
        try:
            read = json.loads(opened.read())
        except (ValueError, RecursionError):
            read = None
    if not isinstance(read, dict):
        raise FolderError(f"{file.name}: not an object of JSON")
    return read


def number(value: object) -> float:
    """Return a number as it was read; NaN for none, and for all that is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if is_number else math.nan  # type: ignore[arg-type]
    except OverflowError:
        return math.nan


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"expected a whole number, got {type(value).__name__}")
    return value


def _numbers(value: object) -> dict[str, float]:
    if not isinstance(value, dict):
        raise TypeError(f"expected names and numbers, got {type(value).__name__}")
    return {str(name): number(one) for name, one in value.items()}


def _rows(value: object) -> list[dict[str, float]]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {type(value).__name__}")
    return [_numbers(one) for one in value]


_READERS: dict[Any, Callable[[Any], Any]] = {
    int: _whole,
    float: number,
    str: str,
    bool: bool,
    Mapping[str, float]: _numbers,
    Sequence[Mapping[str, float]]: _rows,
}


def _importance(read: Mapping[str, Any]) -> Importance:
    modules = {str(name): [number(v) for v in each] for name, each in read["modules"].items()}
    return Importance(_whole(read["server_round"]), str(read["measure"]), modules)


def _answers(read: Mapping[str, Any]) -> Answers:
    texts = ("prompt", "expected", "answer")
    found = tuple(Answer(*(str(one.get(text) or "") for text in texts)) for one in read["answers"])
    return Answers(_whole(read["server_round"]), found)


def _fields(kind: type) -> list[tuple[str, bool, Callable[[Any], Any]]]:
    """Return the name of each field that is shown, whether it must be there, and what reads it.

    One of another type than these keeps its default.
    """
    types = get_type_hints(kind)
    return [
        (f.name, f.default is MISSING and f.default_factory is MISSING, _READERS[types[f.name]])
        for f in fields(kind)
        if types[f.name] in _READERS
    ]


_FIELDS = {kind: _fields(kind) for kind in (RoundRecord, ClientRecord)}


def _record(kind: type[Record], read: Mapping[str, Any]) -> Record:
    """Make a record of a line; of an older app it lacks fields, of a newer one it has more."""
    return kind(
        **{
            name: reader(read[name])
            for name, needed, reader in _FIELDS[kind]
            if needed or name in read
        }
    )
