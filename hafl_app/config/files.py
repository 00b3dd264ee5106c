"""The files of settings: those of `conf/`, and those of a folder of the user's own."""

import os
from pathlib import Path
from typing import Final

OWN_FOLDER: Final = "HAFL_CONFIG_DIR"
"""Environment variable: a folder with further files, which the processes of a run inherit."""


class ConfigFolderError(ValueError):
    """A folder of settings that cannot be used; the message is one line."""


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
    own = own_folder()
    folders = [CONF / group, *([own / group] if own else [])]
    return sorted((file for f in folders for file in f.glob("*.yaml")), key=lambda f: f.stem)


def own_folder() -> Path | None:
    """Return the user's own folder of settings; None without one."""
    given = os.environ.get(OWN_FOLDER)
    return Path(given) if given else None


def use_own_folder(given: str) -> None:
    """Take settings also from a folder laid out like `conf/`, here and in the run's processes.

    Raises
    ------
    ConfigFolderError
        If it is not there, holds no group's file, or one that `conf/` has too.
    """
    folder = Path(given).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigFolderError(f"--config-dir {given}: no such folder")
    os.environ.pop(OWN_FOLDER, None)
    found = False
    for group, shipped in groups().items():
        for file in (folder / group).glob("*.yaml"):
            found = True
            if file.stem in shipped:
                raise ConfigFolderError(
                    f"--config-dir {given}: {group}/{file.name} would hide one of the app; give "
                    "it another name"
                )
    if not found:
        raise ConfigFolderError(
            f"--config-dir {given}: expected files in folders such as experiment/ and model/, as "
            f"in {CONF}"
        )
    os.environ[OWN_FOLDER] = str(folder)
