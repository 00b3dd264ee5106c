"""`hafl compare`: methods on identical partitions, budgets and sampling."""

import shlex
import sys
from collections.abc import Sequence

from hafl_app.cli import FAILED, run_script

_INTERRUPTED = "interrupted; output_dir= with the same folder goes on from here"


def main(arguments: Sequence[str], program: Sequence[str]) -> int:
    """Check the command line, run the comparison, and say how it went; return the exit code."""
    return run_script(lambda: _compare(arguments, program), _INTERRUPTED)


def _compare(arguments: Sequence[str], program: Sequence[str]) -> int:
    from hafl_app.experiments.command import parse_command  # noqa: PLC0415
    from hafl_app.experiments.comparison import check_first  # noqa: PLC0415

    command = parse_command(arguments)
    check_first(command).require_baseline()
    from hafl_app.experiments.compare import compare  # noqa: PLC0415  takes seconds: after typos

    line = shlex.join([*program, *arguments])
    failed = compare(command, line, lambda text: print(text, flush=True))
    if failed:
        print(f"error: {failed} runs failed, see above and their run.log", file=sys.stderr)
    return FAILED if failed else 0
