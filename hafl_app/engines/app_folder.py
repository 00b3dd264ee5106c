"""The folder of the app that `flwr run` builds its bundle from."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hafl_app.config.files import CONF, groups, own_folder

PACKAGE = Path(__file__).resolve().parents[1]
_FILES = ("pyproject.toml", "README.md")  # beside the code in the bundle


@contextmanager
def app_folder() -> Iterator[Path]:
    """Yield the app's folder: the repository, or a copy of what was installed, removed after."""
    repository = PACKAGE.parent
    if CONF.parent == repository and (repository / _FILES[0]).is_file():
        yield repository
        return
    with tempfile.TemporaryDirectory(prefix="hafl-app-") as name:
        copy_code(Path(name))
        for file in _FILES:
            shutil.copy(PACKAGE / file, name)
        yield Path(name)


def copy_code(folder: Path) -> None:
    """Copy the package and `conf/` into a folder, beside each other as in the repository."""
    ignored = shutil.ignore_patterns("__pycache__", *_FILES)

    def ignore(directory: str, names: list[str]) -> set[str]:
        own = {CONF.name} if Path(directory) == CONF.parent else set()
        return ignored(directory, names) | own

    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=ignore)
    shutil.copytree(CONF, folder / CONF.name, ignore=ignored)
    if own := own_folder():
        for group in groups():
            for file in (own / group).glob("*.yaml"):
                shutil.copy(file, folder / CONF.name / group)
