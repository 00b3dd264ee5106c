"""Folder of a comparison: which ones it may have, and that one process at a time writes it."""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

from hafl_app.config.compose import SettingsError
from hafl_app.printable import printable
from hafl_app.run.run_lock import run_lock
from hafl_app.tracking.jsonl import METRICS_FILE

RESULTS_FILE: Final = "results.json"
_LOCK_FILE: Final = ".comparison.lock"  # a run's own would make the folder one of a run


def check_folder(folder: Path, experiment: str) -> None:
    """Refuse a folder whose content would be lost, or that cannot be one; nothing is written.

    Parameters
    ----------
    experiment
        Of the comparison that is to be written there; empty: it has none.

    Raises
    ------
    SettingsError
        In one line.
    """
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise SettingsError(f"output_dir={folder}: {place} is a file; expected a folder")
    if (folder / METRICS_FILE).exists():
        raise SettingsError(
            f"output_dir={folder}: the folder of a run; expected that of a comparison, or a new one"
        )
    earlier = _earlier(folder).get("experiment", experiment)
    if earlier != experiment:
        what = f"experiment={printable(earlier)}" if earlier else "methods without experiment="
        raise SettingsError(
            f"output_dir={folder}: it holds a comparison of {what}; another folder takes this one"
        )


def comparison_lock(folder: Path) -> AbstractContextManager[None]:
    """Lock the folder of a comparison; see `hafl_app.run.run_lock.run_lock`."""
    return run_lock(folder, _LOCK_FILE)


def _earlier(folder: Path) -> dict[str, Any]:
    """Return what the comparison in a folder wrote last; empty if nothing can be read."""
    try:
        found = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
