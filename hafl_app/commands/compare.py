"""`hafl compare`: methods on identical partitions, budgets and sampling."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hafl_app.cli import FAILED, run_script


def main(arguments: Sequence[str], program: Sequence[str]) -> int:
    """Check the command line, run the comparison, and say how it went; return the exit code."""
    begun: list[Path] = []
    return run_script(lambda: _compare(arguments, program, begun), lambda: _interrupted(begun))


def _interrupted(begun: Sequence[Path]) -> str:
    if not begun:
        return "interrupted"
    return f"interrupted; the same command with {shlex.quote(f'output_dir={begun[0]}')} goes on"


def _compare(arguments: Sequence[str], program: Sequence[str], begun: list[Path]) -> int:
    from hafl_app.experiments.command import output_folder, parse_command  # noqa: PLC0415
    from hafl_app.experiments.comparison import check_first  # noqa: PLC0415

    command = parse_command(arguments)
    check_first(command).require_baseline()
    from hafl_app.experiments.compare import compare  # noqa: PLC0415  takes seconds: after typos

    line = shlex.join([*program, *arguments])
    begun.append(output_folder(command.output_dir, command.folder_name))
    command = replace(command, output_dir=begun[0])
    failed = compare(command, line, lambda text: print(text, flush=True))
    if failed:
        runs = "1 run" if failed == 1 else f"{failed} runs"
        print(f"error: {runs} failed, see above and run.log", file=sys.stderr)
    return FAILED if failed else 0
