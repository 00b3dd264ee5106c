"""What a run that stopped leaves to its user: the command that goes on with it."""

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hafl_app.reports.records import read_summary
from hafl_app.run.run_folder import FINISHED, last_round, status
from hafl_app.tracking.base import INTERRUPTED
from hafl_app.tracking.jsonl import JsonlTracker


class RunWatch:
    """The run of one command, watched from outside: its processes may be stopped at any time.

    Parameters
    ----------
    folder
        Of the run.
    program
        How the command began, e.g. ``("python", "scripts/simulate.py")``.
    arguments
        Of the command, as typed.
    """

    def __init__(self, folder: Path, program: Sequence[str], arguments: Sequence[str]) -> None:
        self._folder, self._program, self._arguments = folder, list(program), list(arguments)
        self._before = read_summary(folder)

    def interrupted(self) -> str:
        """Write the status `interrupted` unless the run says more, and return the line to print."""
        now = read_summary(self._folder)
        if status(self._folder) == FINISHED and now != self._before:
            return f"interrupted, but the run is finished: {self._folder}"
        if now == {} or now != self._before:
            with suppress(OSError):
                JsonlTracker(self._folder).fail("interrupted", INTERRUPTED)
        last = last_round(self._folder)
        if last is None:
            again = shlex.join([*self._program, *self._arguments])
            return f"interrupted before the first checkpoint; start again with: {again}"
        return f"interrupted after round {last}; {self._how()}"

    def failed(self) -> str:
        """Return what to append to the error of a run: how to go on, if a round would be lost."""
        return f"; after round {last}, {self._how()}" if (last := last_round(self._folder)) else ""

    def _how(self) -> str:
        """Return the command. A run that was resumed is given its other settings again."""
        resumed = any(key(argument) == "resume" for argument in self._arguments)
        changed = [a for a in self._arguments if resumed and key(a) not in ("resume", "output_dir")]
        command = [*self._program, f"resume={self._folder}", *changed]
        return f"go on with: {shlex.join(command)}"


def key(override: str) -> str:
    """Return what an override sets."""
    return override.partition("=")[0].lstrip("+")
