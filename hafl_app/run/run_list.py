"""Runs in a folder and below: what each was, how it went, and how far it is. Without torch."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from hafl_app.data.errors import nearest
from hafl_app.metrics import task_of
from hafl_app.reports.records import read_summary
from hafl_app.run.progress import progress_line, read_progress
from hafl_app.run.run_folder import FINISHED
from hafl_app.run.run_lock import LOCK_FILE, holder_lives
from hafl_app.tracking.base import FAILED, INTERRUPTED
from hafl_app.tracking.jsonl import METRICS_FILE, SUMMARY_FILE

CONFIG_FILE: Final = "config.yaml"
RUNNING: Final = "running"
STOPPED: Final = "stopped"
"""A run that ended without a word: its process was killed."""

STATES: Final = (FINISHED, RUNNING, FAILED, INTERRUPTED, STOPPED)
_TAIL_BYTES = 65_536  # of metrics.jsonl, in which the last round stands


@dataclass(frozen=True)
class RunEntry:
    """A run as a list shows it.

    Parameters
    ----------
    folder
        Of the run.
    state
        One of `STATES`.
    changed
        When its files were written last, in seconds since the epoch.
    name, tags, method, data, model, seed
        As its settings say; empty where they cannot be read.
    score
        The last known score on the test data, else on others', as text with the metric's unit;
        ``-`` without one.
    progress
        How far it is, if it is running and says so.
    """

    folder: Path
    state: str
    changed: float
    name: str = ""
    tags: tuple[str, ...] = ()
    method: str = ""
    data: str = ""
    model: str = ""
    seed: str = ""
    score: str = "-"
    progress: str = ""


@dataclass(frozen=True)
class RunFilter:
    """Which runs are wanted; what is empty is not asked for.

    Parameters
    ----------
    name
        Part of the name.
    tags
        All of them.
    method, data, state
        Exactly.
    """

    name: str = ""
    tags: Sequence[str] = ()
    method: str = ""
    data: str = ""
    state: str = ""

    def matches(self, run: RunEntry) -> bool:
        """Whether a run is wanted."""
        wanted = ((self.method, run.method), (self.data, run.data), (self.state, run.state))
        return (
            self.name.lower() in run.name.lower()
            and set(self.tags) <= set(run.tags)
            and all(value in ("", found) for value, found in wanted)
        )


def list_runs(root: Path, wanted: RunFilter | None = None) -> list[RunEntry]:
    """Return the wanted runs below a folder, the latest last.

    Raises
    ------
    ValueError
        If there is no such folder, or a method, tag or data set that no run has is asked for.
    """
    if not root.is_dir():
        siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise ValueError(f"{root}: no such folder{nearest(root.name, siblings)}")
    runs = sorted(map(read_entry, run_folders(root)), key=lambda run: run.changed)
    wanted = wanted or RunFilter()
    for word, value, known in (
        ("method", wanted.method, {run.method for run in runs}),
        ("data", wanted.data, {run.data for run in runs}),
        *(("tag", tag, {known for run in runs for known in run.tags}) for tag in wanted.tags),
    ):
        if value and value not in known:
            known_words = sorted(filter(None, known))
            raise ValueError(
                f"--{word} {value}: no run below {root} has it{nearest(value, known_words)}"
            )
    return [run for run in runs if wanted.matches(run)]


def run_folders(root: Path) -> Iterator[Path]:
    """Yield the folders of runs below a folder, or itself; none lies in another one's."""
    for place, folders, files in os.walk(root):
        if CONFIG_FILE in files or (LOCK_FILE in files and METRICS_FILE in files):
            folders.clear()
            yield Path(place)
        else:
            folders[:] = sorted(name for name in folders if not name.startswith("."))


def read_entry(folder: Path) -> RunEntry:
    """Read what a list shows of the run in a folder, whatever is damaged in it."""
    summary = read_summary(folder)
    # A finished run's summary has all of it, and is read faster than its settings.
    facts = summary if isinstance(summary.get("dataset"), dict) else _settings(folder)
    state = _state(folder, summary)
    progress = read_progress(folder) if state == RUNNING else None
    return RunEntry(
        folder,
        state,
        _changed(folder),
        name=_word(facts.get("name")),
        tags=tuple(map(_word, facts["tags"])) if isinstance(facts.get("tags"), list) else (),
        method=_word(_part(facts, "strategy", "_target_")).rpartition(".")[0].rpartition(".")[2],
        data=_word(_part(facts, "dataset", "source")),
        model=_word(_part(facts, "model", "name")),
        seed=_word(facts.get("seed")),
        score=_score(summary.get("final") or _last_metrics(folder)),
        progress=progress_line(progress) if progress else "",
    )


def state_of(
    summary: Mapping[str, Any], began: float, ended: float, lock: Callable[[], str]
) -> str:
    """Return how a run stands, one of `STATES`; one that goes on may have an earlier end.

    Parameters
    ----------
    summary
        Of its folder; empty if there is none.
    began, ended
        When its lock and its summary were written, in seconds since the epoch; 0 for none.
    lock
        Returns the text of its lock.
    """
    if began > ended and holder_lives(lock(), began):
        return RUNNING
    status = summary.get("status")
    return str(status) if status in STATES else STOPPED


def _state(folder: Path, summary: Mapping[str, Any]) -> str:
    began, ended = (_written(folder / name) for name in (LOCK_FILE, SUMMARY_FILE))
    return state_of(summary, began, ended, lambda: _lock(folder))


def _lock(folder: Path) -> str:
    try:
        return (folder / LOCK_FILE).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _written(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _settings(folder: Path) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
        found = yaml.load(text, loader)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _part(facts: Mapping[str, Any], group: str, key: str) -> Any:
    found = facts.get(group)
    return found.get(key) if isinstance(found, dict) else None


def _word(value: Any) -> str:
    return "" if value is None else str(value)


def _changed(folder: Path) -> float:
    found = 0.0
    for name in (SUMMARY_FILE, METRICS_FILE, CONFIG_FILE):
        path = folder / name
        if path.exists():
            found = max(found, path.stat().st_mtime)
    return found


def _last_metrics(folder: Path) -> Mapping[str, Any]:
    """Return the metrics of the last round that is written."""
    try:
        with (folder / METRICS_FILE).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("kind") == "round":
            metrics = record.get("metrics")
            return metrics if isinstance(metrics, dict) else {}
    return {}


def _score(metrics: Any) -> str:
    if not isinstance(metrics, dict):
        return "-"
    metric = task_of(map(str, metrics)).primary
    for phase in ("test", "validation", "clients"):
        value = metrics.get(metric.key(phase))
        if isinstance(value, int | float) and math.isfinite(value):
            where = "" if phase == "test" else f" {phase}"
            return f"{metric.unit} {metric.text(value)}{where}".lstrip()
    return "-"
