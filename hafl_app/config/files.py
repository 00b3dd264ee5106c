"""The files of `conf/`: where they are, and what the groups offer."""

from pathlib import Path
from typing import Final


def _find_conf() -> Path:
    """Return `conf/`: inside the package where it was installed, else beside it."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


CONF: Final = _find_conf()


def groups() -> dict[str, list[str]]:
    """Return the names of the files of every group, in order."""
    folders = (path for path in sorted(CONF.iterdir()) if path.is_dir())
    return {path.name: [file.stem for file in files_of(path.name)] for path in folders}


def files_of(group: str) -> list[Path]:
    """Return the files of a group, in order."""
    return sorted((CONF / group).glob("*.yaml"))
