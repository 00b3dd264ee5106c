"""Runs under the folders that a user names: single ones, sweeps, comparisons.

Standard library only, so that a wrong folder is answered before pandas is imported.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hafl_app.tracking.jsonl import METRICS_FILE, SUMMARY_FILE

COMPARISON_FILE: Final = "results.json"
_OF_A_RUN = (METRICS_FILE, SUMMARY_FILE, "config.yaml")
_RUN = re.compile(r"seed\d+")
_MOST_FOLDERS = 20_000


class NoRunError(ValueError):
    """A folder without a run; the message is one line."""


@dataclass(frozen=True)
class Place:
    """Folder that holds a run, or was to hold one.

    Parameters
    ----------
    folder
        Of the run.
    comparison
        Folder of the comparison that it belongs to, if it does.
    baseline
        Of that comparison; empty without one.
    """

    folder: Path
    comparison: Path | None = None
    baseline: str = ""

    @property
    def cell(self) -> str:
        """Cell of a comparison; empty outside of one, or where it has no cells."""
        parts = self._parts[:-2]
        return "/".join(parts)

    @property
    def method(self) -> str:
        """Name of the method in a comparison; empty outside of one."""
        return self._parts[-2] if len(self._parts) > 1 else ""

    @property
    def _parts(self) -> tuple[str, ...]:
        return self.folder.relative_to(self.comparison).parts if self.comparison else ()


def find_runs(folders: Sequence[Path]) -> list[Place]:
    """Find all runs in and under these folders, each once.

    The search runs of a comparison, its earlier ones of other settings, and what a run saved beside
    its records, do not count.

    Raises
    ------
    NoRunError
        If one of the folders is not there, or has no run in it.
    """
    found: dict[Path, Place] = {}
    for folder in folders:
        if not folder.is_dir():
            raise NoRunError(f"{folder}: no such folder")
        its = {place.folder.resolve(): place for place in _places(folder)}
        if not its:
            raise NoRunError(f"{folder}: no run in it; expected a folder with {METRICS_FILE}")
        found |= {path: place for path, place in its.items() if path not in found}
    return list(found.values())


def require_records(folders: Sequence[Path]) -> None:
    """Refuse folders without a run's records.

    Raises
    ------
    NoRunError
        In one line.
    """
    for folder in folders:
        if not (folder / METRICS_FILE).is_file():
            raise NoRunError(f"{folder}: no readable {METRICS_FILE}, so no run")


def _places(top: Path) -> Iterator[Place]:
    comparisons: dict[Path, Mapping[str, Any]] = {}
    for number, (path, names, files) in enumerate(os.walk(top)):
        if number >= _MOST_FOLDERS:
            raise NoRunError(f"{top}: more than {_MOST_FOLDERS:,} folders; name the runs' own")
        folder = Path(path)
        if any(name in files for name in _OF_A_RUN):
            names.clear()  # what lies in a run is its own
            owner = next((c for c in folder.parents if c in comparisons), None)
            if owner and not _RUN.fullmatch(folder.name):
                continue  # a run that gave way to one of other settings
            baseline = str(comparisons[owner]["baseline"]) if owner else ""
            yield Place(folder, owner, baseline)
            continue
        if comparison := _comparison(folder):
            comparisons[folder] = comparison
        left_out = {"tuning"} if comparison else set()
        names[:] = sorted(
            (n for n in names if n not in left_out and not n.startswith(".")), key=_by_number
        )


def _comparison(folder: Path) -> Mapping[str, Any]:
    """Return the results of a comparison; empty if the folder is none's."""
    try:
        results = json.loads((folder / COMPARISON_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return results if isinstance(results, dict) and "baseline" in results else {}


def _by_number(name: str) -> tuple[int, int, str]:
    """Sort the numbered folders of a sweep by number."""
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)
