"""Where a run comes from: the command that started it, and the commit of the code.

A command tells it to all processes of its run through the environment.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

_VARIABLE: Final = "HAFL_ORIGIN"
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Origin:
    """Origin of a run.

    Parameters
    ----------
    command
        As it was typed; empty if it is not known.
    commit
        Of the code, ``-dirty`` behind it if files were changed since; empty outside a checkout.
    closes
        Whether the command prints the closing block, since it knows how long all of it took.
    watched
        Whether it shows on a terminal how far the run is.
    """

    command: str = ""
    commit: str = ""
    closes: bool = False
    watched: bool = False


def origin() -> Origin:
    """Return what a command has told this process; without one, what is known here."""
    told: Any = {}
    with suppress(ValueError):
        told = json.loads(os.environ.get(_VARIABLE, "{}"))
    known = {f.name: told[f.name] for f in fields(Origin) if f.name in told}
    found = Origin(**known)
    return found if found.commit else replace(found, commit=commit())


@contextmanager
def announced(command: Origin) -> Iterator[None]:
    """Tell this process, and those that it starts, where its runs come from."""
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = json.dumps(asdict(command))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = before


def commit() -> str:
    """Return the commit of the checkout that this code lies in; empty if it is in none."""
    if not (_ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [*command, "--dirty"], capture_output=True, text=True, check=True, timeout=5
        )
        return done.stdout.strip()
    return ""
