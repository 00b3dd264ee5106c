"""Lock on the folder of a run: one process at a time writes it."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from os import getpid
from pathlib import Path
from typing import Final

import psutil

LOCK_FILE: Final = ".lock"
_JITTER_S = 2.0  # between the clock of files and that of processes


class RunLockedError(RuntimeError):
    """The folder of a run is locked by another process."""

    def __init__(self, folder: Path, pid: int) -> None:
        super().__init__(f"{folder}: process {pid} is still running this; stop it first")
        self.pid = pid


@contextmanager
def run_lock(folder: Path, name: str = LOCK_FILE) -> Iterator[None]:
    """Lock the folder of a run; the system unlocks it when the process ends, even by a kill.

    Parameters
    ----------
    name
        Of the file of the lock.

    Raises
    ------
    RunLockedError
        If another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RunLockedError(folder, int(file.read() or 0)) from error
        file.truncate(0)
        file.write(str(getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)  # for those who only look, see `holder_lives`


def check_unlocked(folder: Path) -> None:
    """Refuse a folder in which a run is going on, before anything is written into it.

    Raises
    ------
    RunLockedError
        If another process holds it.
    """
    if (folder / LOCK_FILE).exists():
        with run_lock(folder):
            pass


def holder_lives(pid: str, taken: float) -> bool:
    """Whether the process that a lock names is there, since before the lock was taken.

    For those who only look: to try the lock would turn away a run that starts meanwhile.

    Parameters
    ----------
    pid
        As the file of the lock has it; anything that is no number names no process.
    taken
        When the file was written, in seconds since the epoch.
    """
    try:
        return psutil.Process(int(pid)).create_time() <= taken + _JITTER_S
    except (ValueError, OverflowError, psutil.Error):
        return False
