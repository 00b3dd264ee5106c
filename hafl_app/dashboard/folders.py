"""Folders of runs below one root: found, and read without ever leaving it."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hafl_app.run.run_lock import LOCK_FILE
from hafl_app.tracking.jsonl import METRICS_FILE, SUMMARY_FILE

_MARKS = {METRICS_FILE, SUMMARY_FILE, LOCK_FILE}
_WITHOUT_RUNS = {"checkpoints", "adapter", "adapter-best", "logs", "wandb"}
_DEEPEST = 8
_MOST_BYTES = 256 * 2**20
MEGABYTE = 1e6


class FolderError(ValueError):
    """A folder or a file that is not shown; the message is one line."""


class Root:
    """The folder whose runs are shown.

    Parameters
    ----------
    folder
        Its own links are followed once, here.

    Raises
    ------
    FolderError
        If it is none.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder.expanduser().resolve()
        if not self.path.is_dir():
            raise FolderError(f"{folder}: no such folder; expected one with runs, such as outputs")

    def names(self) -> list[str]:
        """Return the runs' folders, relative to the root; ``.`` is the root itself.

        No link is followed, and no folder is entered that holds parts of a run.
        """
        return sorted(self._names(self.path, 0))

    def _names(self, folder: Path, depth: int) -> Iterator[str]:
        try:
            entries = list(os.scandir(folder))
        except OSError:
            return  # no permission, or removed a moment ago
        if any(entry.name in _MARKS for entry in entries):
            yield folder.relative_to(self.path).as_posix()
        for entry in entries:
            hidden = entry.name.startswith(".") or entry.name in _WITHOUT_RUNS
            if not hidden and depth < _DEEPEST and entry.is_dir(follow_symlinks=False):
                yield from self._names(Path(entry.path), depth + 1)

    def folder(self, name: str) -> Path:
        """Return the folder of a run.

        Raises
        ------
        FolderError
            If there is none of this name, or it is not below the root.
        """
        try:
            folder = (self.path / name).resolve()
            inside = folder.is_relative_to(self.path) and ".." not in Path(name).parts
            if inside and any((folder / mark).exists() for mark in _MARKS):
                return folder
        except (OSError, ValueError):  # too long, or with a null byte
            pass
        raise FolderError("there is no such run")

    def open(self, file: Path) -> BinaryIO:
        """Open a regular file below the root to read it.

        Raises
        ------
        FolderError
            If it is not one, lies elsewhere, is too large, or cannot be read.
        """
        try:
            # Not to wait for the other end of a pipe.
            opened = os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a file's name"
            raise FolderError(f"{file.name}: {reason}") from error
        try:
            self._check(opened, file.name)
        except FolderError:
            opened.close()
            raise
        return opened

    def _check(self, opened: BinaryIO, name: str) -> None:
        # What was opened, whatever its name leads to by now.
        actual = Path(f"/proc/self/fd/{opened.fileno()}").resolve()
        if not actual.is_relative_to(self.path):
            raise FolderError(f"{name}: it leads out of the folder, and is not read")
        status = os.fstat(opened.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise FolderError(f"{name}: not a file")
        if status.st_size > _MOST_BYTES:
            raise FolderError(
                f"{name}: {status.st_size / MEGABYTE:.0f} MB, more than the "
                f"{_MOST_BYTES / MEGABYTE:.0f} MB that are read"
            )
