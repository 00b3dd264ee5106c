"""A run as its folder tells it, whatever is missing or damaged in it."""

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import yaml

from hafl_app.dashboard.folders import FolderError, Root
from hafl_app.dashboard.outcome import ClientAnswers, answers_of_clients, stopped_early
from hafl_app.dashboard.records import Answers, Importance, Records, number, read_json
from hafl_app.metrics import Metric, task_of
from hafl_app.run.run_list import CONFIG_FILE, RUNNING, state_of
from hafl_app.run.run_lock import LOCK_FILE
from hafl_app.tracking.base import ClientRecord, RoundRecord
from hafl_app.tracking.details import DETAILS_FILE
from hafl_app.tracking.jsonl import CLIENTS_FILE, METRICS_FILE, SUMMARY_FILE

PHASES: Final = ("test", "validation", "clients")


def phases_of(runs: Sequence["Run"]) -> list[str]:
    """Return the phases of which a score of these runs is known, that of most rounds first."""
    known = {phase: sum(run.num_scores(phase) for run in runs) for phase in PHASES}
    return sorted((phase for phase in PHASES if known[phase]), key=lambda p: -known[p])


@dataclass(frozen=True)
class Run:
    """What is shown of a run.

    Attributes
    ----------
    name
        Its folder below the root.
    state
        One of `STATES`.
    reason
        Why it failed; empty if it did not.
    settings, summary, clients
        Of its files; empty where there are none.
    rounds, trainings, importance
        Its records so far.
    answers
        The last ones to the prompts that it watches; None if there are none.
    faults
        A line for each file, or part of one, that could not be read.
    written
        When one of its files was last written, in seconds since 1970.
    """

    name: str
    state: str
    reason: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    clients: Mapping[str, Any] = field(default_factory=dict)
    rounds: Sequence[RoundRecord] = ()
    trainings: Sequence[ClientRecord] = ()
    importance: Sequence[Importance] = ()
    answers: Answers | None = None
    faults: Sequence[str] = ()
    written: float = 0.0

    @property
    def label(self) -> str:
        """The run's own name and its tags, as they stand in the settings."""
        name, tags = self.settings.get("name"), self.settings.get("tags")
        return " ".join(str(w) for w in (name, *(tags if isinstance(tags, list) else ())) if w)

    @property
    def method(self) -> str:
        """Name of the strategy's file."""
        target = str(_at(self.settings, "strategy", "_target_") or "")
        return target.split(".")[-2] if target.count(".") else target

    @property
    def data(self) -> str:
        """The data set's source."""
        return str(_at(self.settings, "dataset", "source") or "")

    @property
    def model(self) -> str:
        """The base model's name."""
        named = (_at(self.summary, "model", "name"), _at(self.settings, "model", "name"))
        return str(next((name for name in named if name), ""))

    @property
    def seed(self) -> str:
        """The seed as it stands in the settings."""
        return str(self.settings.get("seed", ""))

    @property
    def num_rounds(self) -> str:
        """Rounds that it is to have, as it stands in the settings."""
        return str(_at(self.settings, "federation", "num_rounds") or "")

    @property
    def last_round(self) -> int:
        """The last finished round; -1 before round 0 is scored."""
        return self.rounds[-1].server_round if self.rounds else -1

    @property
    def bytes_down(self) -> int:
        """Bytes to the clients so far."""
        return sum(record.bytes_down for record in self.rounds)

    @property
    def bytes_up(self) -> int:
        """Bytes from the clients so far."""
        return sum(record.bytes_up for record in self.rounds)

    @property
    def metric(self) -> Metric:
        """The task's primary metric."""
        return task_of({name for record in self.rounds for name in record.metrics}).primary

    @property
    def score(self) -> str:
        """The newest score with its phase, e.g. ``test 83.5%``; empty if there is none."""
        for record in reversed(self.rounds):
            for phase in PHASES:
                value = record.metrics.get(self.metric.key(phase), math.nan)
                if math.isfinite(value):
                    return f"{phase} {self.metric.text(value)}"
        return ""

    @property
    def stopped_early(self) -> str:
        """That it ended before its last round, and why; empty if it did not."""
        return stopped_early(self.summary)

    @property
    def answers_of_clients(self) -> list[ClientAnswers]:
        """Scores of the answers that its clients wrote."""
        return answers_of_clients(self.summary)

    def num_scores(self, phase: str) -> int:
        """Return of how many rounds a score is known."""
        return sum(map(math.isfinite, self.scores(phase)))

    def scores(self, phase: str) -> list[float]:
        """Return the score of each round; NaN where it is not known."""
        key = self.metric.key(phase)
        return [record.metrics.get(key, math.nan) for record in self.rounds]

    @property
    def version(self) -> str:
        """Changes whenever a figure of this run would."""
        return f"{self.written:.3f}-{len(self.rounds)}-{len(self.trainings)}"


class RunReader:
    """Reads the runs of a root again and again, and of what only grows the rest alone.

    Parameters
    ----------
    root
        See `hafl_app.dashboard.folders.Root`.
    """

    def __init__(self, root: Root) -> None:
        self.root = root
        self._records: dict[str, tuple[Records, Records]] = {}  # metrics, details
        self._ended: dict[str, tuple[object, Run]] = {}
        self._lock = threading.Lock()

    def all(self) -> list[Run]:
        """Return every run, the one that was written last first."""
        names = self.root.names()
        with self._lock:
            for gone in set(self._records) - set(names):
                del self._records[gone]
                self._ended.pop(gone, None)
        runs = []
        for name in names:
            with suppress(FolderError):  # removed a moment ago
                runs.append(self.read(name))
        return sorted(runs, key=lambda run: run.written, reverse=True)

    def read(self, name: str) -> Run:
        """Return a run as it is now.

        Raises
        ------
        FolderError
            If there is no such run.
        """
        folder = self.root.folder(name)
        name = folder.relative_to(self.root.path).as_posix()  # one name, however it is spelled
        stamps = _stamps(folder)
        with self._lock:
            known = self._ended.get(name)
            if known and known[0] == stamps:
                return known[1]
            run = self._read(name, folder, stamps)
            if run.state != RUNNING:
                self._ended[name] = stamps, run
        return run

    def _read(self, name: str, folder: Path, stamps: Mapping[str, float]) -> Run:
        faults: list[str] = []
        records, details = self._records.setdefault(name, (Records(), Records()))
        for file, held in ((METRICS_FILE, records), (DETAILS_FILE, details)):
            if file in stamps:
                try:
                    held.read_on(self.root, folder / file)
                except FolderError as error:
                    faults.append(str(error))
        summary = self._json(folder / SUMMARY_FILE, stamps, faults)
        began, ended = stamps.get(LOCK_FILE, 0.0), stamps.get(SUMMARY_FILE, 0.0)
        state = state_of(summary, began, ended, lambda: self._holder(folder / LOCK_FILE))
        if records.is_cut and state != RUNNING:
            faults.append(f"{METRICS_FILE}: its last line was not written to its end")
        return Run(
            name,
            state,
            str(summary.get("reason") or ""),
            self._settings(folder / CONFIG_FILE, stamps, faults),
            summary,
            self._json(folder / CLIENTS_FILE, stamps, faults),
            _completed(records.rounds, summary),
            tuple(records.clients),
            tuple(details.importance),
            details.answers,
            (*faults, *records.faults, *details.faults),
            max(stamps.values(), default=0.0),
        )

    def _json(
        self, file: Path, stamps: Mapping[str, float], faults: list[str]
    ) -> Mapping[str, Any]:
        if file.name not in stamps:
            return {}
        try:
            return read_json(self.root, file)
        except FolderError as error:
            faults.append(str(error))
            return {}

    def _settings(
        self, file: Path, stamps: Mapping[str, float], faults: list[str]
    ) -> Mapping[str, Any]:
        if file.name not in stamps:
            return {}
        try:
            with self.root.open(file) as opened:
                read = yaml.load(opened, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            if isinstance(read, dict):
                return read
            faults.append(f"{file.name}: not settings of a run")
        except FolderError as error:
            faults.append(str(error))
        except (yaml.YAMLError, ValueError, RecursionError):
            faults.append(f"{file.name}: not YAML")
        return {}

    def _holder(self, file: Path) -> str:
        try:
            with self.root.open(file) as opened:
                return opened.read(20).decode("ascii", "replace")
        except FolderError:
            return ""


def _stamps(folder: Path) -> dict[str, float]:
    """Return when each of a run's files was last written."""
    records = (METRICS_FILE, DETAILS_FILE)
    stamps = {}
    for name in (*records, SUMMARY_FILE, CLIENTS_FILE, CONFIG_FILE, LOCK_FILE):
        try:
            stamps[name] = (folder / name).lstat().st_mtime
        except OSError:
            continue
    return stamps


def _completed(rounds: Iterable[RoundRecord], summary: Mapping[str, Any]) -> list[RoundRecord]:
    """Add the test scores that came at the end: of the last round, and of the chosen one."""
    completed = list(rounds)
    best = summary.get("best_validation")
    best = best if isinstance(best, dict) else {}
    for place, record in enumerate(completed):
        later = best if record.server_round == best.get("round") else {}
        if place == len(completed) - 1 and isinstance(summary.get("final"), dict):
            later = {**later, **summary["final"]}
        scores = {str(key): number(value) for key, value in later.items() if "/" in str(key)}
        if scores:
            completed[place] = replace(record, metrics={**scores, **record.metrics})
    return completed


def _at(tree: Mapping[str, Any], group: str, name: str) -> Any:
    """Return a value of a group; None if the group is none, or lacks it."""
    found = tree.get(group)
    return found.get(name) if isinstance(found, dict) else None
