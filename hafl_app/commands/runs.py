"""`hafl runs`: the runs in a folder, with what they were and how they went."""

from datetime import datetime
from pathlib import Path

from rich.text import Text

from hafl_app.cli import run_script
from hafl_app.packages import short
from hafl_app.printable import printable
from hafl_app.run.run_list import RunEntry, RunFilter, list_runs
from hafl_app.tracking.as_text import Printer
from hafl_app.tracking.base import FAILED

_LONGEST = 40  # of a name or a list of tags


def main(root: Path, wanted: RunFilter, last: int | None, paths: bool) -> int:
    """Print the runs; return the exit code.

    Parameters
    ----------
    root
        Folder that holds them, at any depth.
    last
        Only so many, the latest; None for all.
    paths
        Print their folders alone, for another command.
    """
    return run_script(lambda: _runs(root, wanted, last, paths))


def _runs(root: Path, wanted: RunFilter, last: int | None, paths: bool) -> int:
    runs = list_runs(root, wanted)
    chosen = runs if last is None else runs[-last:]
    if paths:
        for run in chosen:
            print(short(run.folder))
        return 0
    if not chosen:
        print(f"no run below {root}" + (" is like that" if wanted != RunFilter() else ""))
        return 0
    printer = Printer()
    for run in chosen:
        printer.parts(parts_of(run))
        printer.path(f"  {printable(short(run.folder), 4000)}")
    return 0


def parts_of(run: RunEntry) -> list[Text]:
    """Return what a list says of a run, in order; what is not known is empty."""
    when = datetime.fromtimestamp(run.changed).astimezone()
    tags = f"[{', '.join(run.tags)}]" if run.tags else ""
    style = {"finished": "green", FAILED: "red"}.get(run.state, "yellow")
    seed = f"seed {run.seed}" if run.seed else ""
    words = (run.method, run.data, run.name, tags, run.model, seed, run.progress)
    return [
        Text(f"{when:%Y-%m-%d %H:%M}"),
        Text(f"{run.state:<11}", style=style),
        Text(f"{run.score:>6}", style="bold"),
        *(Text(printable(word, _LONGEST)) for word in words if word),
    ]
