"""What a command shows of its runs: how far they are while they go on, and the block at the end."""

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from hafl_app.packages import short
from hafl_app.printable import printable
from hafl_app.process_identity import seconds_of_process
from hafl_app.reports.records import read_summary
from hafl_app.run.progress import progress_line, read_progress
from hafl_app.run.run_folder import FINISHED
from hafl_app.tracking.as_text import Printer, short_duration, standard_output
from hafl_app.tracking.base import RoundRecord
from hafl_app.tracking.closing import Clock, print_closing
from hafl_app.tracking.jsonl import read_history

_BAR = 6  # columns
_REFRESHED_A_SECOND = 2
_EVERY_ROUND = 2**62


class Screen:
    """The terminal of a command, with a last line that moves; nothing where there is no terminal.

    What others print meanwhile stands above that line.

    Parameters
    ----------
    console
        None for standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or standard_output()
        self._live: Live | None = None
        self._spinner = Spinner("dots")
        self._folder: Path | None = None
        self._started = time.monotonic() - seconds_of_process()

    @property
    def is_live(self) -> bool:
        """Whether there is a terminal."""
        return self._console.is_terminal and not self._console.is_dumb_terminal

    def __enter__(self) -> Self:
        """Show that the command is at work."""
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the line away."""
        self._stop()

    def follow(self, folder: Path) -> None:
        """Show how far the run in a folder is; the time of the first began with the process."""
        if self._folder is not None:
            self._started = time.monotonic()
        self._folder = folder
        Printer(self._console).path(f"Output folder: {printable(short(folder), 4000)}")
        self._start()

    def close_run(self) -> None:
        """Print the closing block of the run that is followed, if it is finished."""
        self._stop()
        if self._folder is not None:
            print_run(self._folder, time.monotonic() - self._started, self._console)

    def _start(self) -> None:
        if self.is_live and self._live is None:
            self._live = Live(
                get_renderable=self._line,
                console=self._console,
                refresh_per_second=_REFRESHED_A_SECOND,
                transient=True,
                # An error of a run whose errors go to a file stays out of the terminal.
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self) -> Table:
        """Return spinner, bar of the clients, stage, and the time so far."""
        state = read_progress(self._folder) if self._folder else None
        row: list[Spinner | ProgressBar | Text] = [self._spinner]
        if state is None:
            row.append(Text("at work" if self._folder else "checking settings, model and data"))
        else:
            if state["asked"]:
                row.append(ProgressBar(state["asked"], state["done"], width=_BAR))
            if state["seconds_left"] is not None:
                passed = time.time() - state["written"]
                state["seconds_left"] = max(0.0, state["seconds_left"] - passed)
            row.append(Text(progress_line(state)))
        passed = short_duration(time.monotonic() - self._started)
        row.append(Text(f"({passed} so far)", style="dim"))
        line = Table.grid(*("" for _ in row), padding=(0, 1, 0, 0))
        for column in line.columns:
            column.no_wrap = True
        line.add_row(*row)
        return line


def print_run(folder: Path, seconds: float, console: Console) -> None:
    """Print the closing block of a finished run.

    Parameters
    ----------
    seconds
        That its command took.
    """
    summary = read_summary(folder)
    if summary.get("status") != FINISHED:
        return
    rounds: list[RoundRecord] = list(read_history(folder, _EVERY_ROUND).rounds)
    clock = Clock(seconds, float(summary.get("seconds_before", 0.0)))
    print_closing(Printer(console), summary, rounds, clock, folder)
