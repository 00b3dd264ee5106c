"""Find the run to resume, without torch: a wrong folder is reported before it is imported."""

from datetime import UTC, datetime
from pathlib import Path

from hafl_app.server.checkpoint_files import newest_first

_JITTER_S = 5.0  # by which a file server's clock may be ahead


class ResumeError(ValueError):
    """A run that cannot be resumed, or not with these settings."""


def require_checkpoint(folder: Path) -> None:
    """Refuse a folder without a checkpoint.

    Raises
    ------
    ResumeError
        In one line.
    """
    if not newest_first(folder / "checkpoints"):
        raise ResumeError(f"resume={folder}: no checkpoint there; expected the folder of a run")


def latest_run(outputs: Path) -> Path:
    """Return the folder under ``outputs`` whose checkpoint is the newest.

    Raises
    ------
    ResumeError
        If there is none, or the clock was set back since one was written: then no time says which
        is the newest.
    """
    files = sorted(outputs.rglob("checkpoints/round-*.safetensors"), key=_modified)
    if not files:
        raise ResumeError(f"resume=latest: no run with a checkpoint under {outputs.absolute()}")
    newest = files[-1].parents[1].absolute()
    if len({path.parents[1] for path in files}) > 1 and _modified(files[-1]) > _now() + _JITTER_S:
        raise ResumeError(
            f"resume=latest: {newest} was written after now, so the clock was set back and the "
            f"newest run is not known; name it: resume={newest}"
        )
    return newest


def _now() -> float:
    return datetime.now(UTC).timestamp()


def _modified(path: Path) -> float:
    return path.stat().st_mtime
