"""Optional packages: whether one is installed, and the command that installs it.

Standard library only. The app is on no package index, so that no command names it: in a checkout
the pinned versions of `constraints.txt` are installed, elsewhere those that the wheel asks for.
"""

import importlib.util
import os
import re
import shlex
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Final

APP: Final = "hafl-app"
_CONSTRAINTS: Final = Path(__file__).resolve().parents[1] / "constraints.txt"

OPTIONAL: Final = {
    "bitsandbytes": "bases in int8 and nf4",
    "rouge-score": "scores of generated answers",
    "lm-eval": "benchmarks in hafl evaluate",
    "gguf": "base models in GGUF files, such as model=smollm2; hafl export --gguf",
    "tensorboard": "tracking=tensorboard",
    "mlflow-skinny": "tracking=mlflow",
    "trackio": "tracking=trackio",
    "wandb": "tracking=wandb",
}
"""Packages that some settings need, and for what."""


_MODULES: Final = {"mlflow-skinny": "mlflow"}
"""Modules that are not called like their package."""


class MissingPackageError(ValueError):
    """A package that settings need and that is not installed."""


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it.

    Parameters
    ----------
    package
        Its name to pip.
    """
    found = importlib.util.find_spec(_MODULES.get(package, package.replace("-", "_")))
    # A folder of that name, such as wandb makes, looks like a package without a file.
    return found is not None and found.origin is not None


def require(package: str, who: str) -> None:
    """Refuse what needs a package that is not there.

    Parameters
    ----------
    who
        What needs it, e.g. ``tracking=wandb``.

    Raises
    ------
    MissingPackageError
        In one line, with the command that installs it.
    """
    if not is_installed(package):
        raise MissingPackageError(missing(package, who))


def missing(package: str, who: str) -> str:
    """Say that a package is missing, and how to install it."""
    return f"{who} needs the package {package}: {install_command(package)}"


def install_command(package: str, *, alone: bool = False) -> str:
    """Return the command that installs a package into the environment of this process.

    Parameters
    ----------
    alone
        Without what it depends on: for a package of which only a file is used.
    """
    pip = [python_command(), "-m", "pip", "install"]
    if importlib.util.find_spec("pip") is None:  # as uv makes environments
        pip = ["uv", "pip", "install", "--python", python_command()]
    pip += ["--no-deps"] if alone else []
    if _CONSTRAINTS.is_file():
        return shlex.join([*pip, "-c", short(_CONSTRAINTS), package])
    return shlex.join([*pip, _requirement(package)])


def python_command() -> str:
    """Return how this interpreter is called from a shell: ``python`` if the shell finds it so."""
    found = shutil.which("python")
    return "python" if found and Path(found) == Path(sys.executable) else short(sys.executable)


def short(path: str | Path) -> str:
    """Return a path as it is typed here: relative if it lies below the current folder."""
    try:
        inside = os.path.relpath(path)
    except (OSError, ValueError):  # the current folder is gone
        return str(path)
    return str(path) if inside.startswith(os.pardir) else inside


def _requirement(package: str) -> str:
    """Return a package with the versions that the installed app asks for, as in its extras."""
    try:
        required = metadata.requires(APP) or []
    except metadata.PackageNotFoundError:
        return package
    name = re.escape(package)
    found = (re.match(rf"{name}(?![\w.-])[^;]*", line, re.IGNORECASE) for line in required)
    return next((match.group().strip() for match in found if match), package)


def hafl_command() -> str:
    """Return how `hafl` is called from a shell, in the environment of this process."""
    beside = Path(sys.executable).with_name("hafl")
    if not beside.exists():
        return f"{shlex.quote(python_command())} -m hafl_app.commands"
    found = shutil.which("hafl")
    return "hafl" if found and Path(found) == beside else shlex.quote(short(beside))
