"""Folder of a run: its name, and the refusal of one whose earlier run would be lost."""

import shlex
from datetime import datetime
from pathlib import Path

from hafl_app.config.schema import Settings
from hafl_app.disk import unused
from hafl_app.reports.records import read_summary
from hafl_app.run.run_lock import check_unlocked
from hafl_app.server.checkpoint_files import newest_first

FINISHED = "finished"


class RunFolderError(ValueError):
    """A folder that a run cannot have; the message is one line."""


def output_folder(settings: Settings) -> Path:
    """Return the absolute folder of a run; nothing is written.

    That of the run to resume, else `output_dir`, else a new one named by time and method.

    Raises
    ------
    RunFolderError
        If an earlier run would be lost, or `output_dir` is not the folder of the run to resume.
    """
    given = settings.output_dir and absolute(settings.output_dir)
    if settings.resume:
        folder = absolute(settings.resume)
        if given not in (None, folder):
            raise RunFolderError(
                f"output_dir={given}: a resumed run goes on in its own folder, {folder}; leave out "
                "output_dir="
            )
        return folder
    if not given:
        return default_folder(type(settings.strategy).__module__.rpartition(".")[2])
    check_new(given)
    return given


def default_folder(name: str) -> Path:
    """Return ``outputs/<date>/<time>-<name>``, absolute; numbered if it exists.

    It may, after a clock was set back or where two runs start in one second.
    """
    now = datetime.now().astimezone()
    return unused(Path("outputs").absolute() / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}-{name}")


def absolute(path: str | Path) -> Path:
    """Return a path that a user typed, without ``~``, and absolute."""
    return Path(path).expanduser().absolute()


def check_new(folder: Path) -> None:
    """Refuse a folder with a finished run, or with one that trained and can be resumed.

    A run that failed before its first round has nothing to lose, and is replaced.

    Raises
    ------
    RunFolderError
        With what to do instead.
    hafl_app.run.run_lock.RunLockedError
        If a run is going on in it.
    """
    check_unlocked(folder)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"output_dir={folder}: a file; expected a folder, or a new name")
    last = last_round(folder)
    holds = "a finished run" if status(folder) == FINISHED else ""
    if not holds and last:
        holds = f"a run that stopped after round {last}"
    if holds:
        command = shlex.quote(f"resume={folder}")
        resume = f"{command} goes on with it, " if last is not None else ""
        raise RunFolderError(
            f"output_dir={folder}: it holds {holds}; {resume}another folder takes a new run"
        )


def set_aside(folder: Path) -> Path | None:
    """Make room for a run: rename the folder of a finished one, drop an unfinished one's rounds.

    Returns
    -------
    Path
        The new name of the finished one; None if there is none.

    Raises
    ------
    hafl_app.run.run_lock.RunLockedError
        If a run is going on in it.
    """
    check_unlocked(folder)
    if status(folder) == FINISHED:
        return folder.rename(unused(folder.with_name(f"{folder.name}-before")))
    for path in (folder / "checkpoints").glob("round-*.safetensors"):
        path.unlink()
    return None


def status(folder: Path) -> str | None:
    """Return how the run in a folder ended; None if there is none, or it has not ended."""
    found = read_summary(folder).get("status")
    return None if found is None else str(found)


def last_round(folder: Path) -> int | None:
    """Return the round of a folder's newest checkpoint; None if there is none."""
    return next((number for number, _ in newest_first(folder / "checkpoints")), None)
