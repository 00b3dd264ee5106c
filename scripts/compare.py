"""Compare methods: `python scripts/compare.py experiment=hafl_banking77 seeds=0,1,2`.

Runs every method of an experiment file on identical partitions, budgets and sampling, and writes
one table and one figure. Further arguments:

    workers=2             processes that train at once (default 1)
    tune=false            take the learning rates of the experiment file instead of searching
    methods=a,b cells=c   only these of the experiment
    older=true            keep finished runs that lack a setting which has its default now
    output_dir=FOLDER     where to write; finished runs of an earlier comparison there are kept

All other arguments are Hydra overrides that hold for every run, e.g. federation.num_rounds=5.
"""

import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import FAILED, run_program  # noqa: E402


def main() -> int:
    """Check the command line, run the comparison, and say how it went."""
    return run_program(
        __doc__, _compare, "interrupted; output_dir= with the same folder goes on from here"
    )


def _compare(arguments: list[str]) -> int:
    from hafl_app.experiments.command import parse_command
    from hafl_app.experiments.comparison import check_first

    command = parse_command(arguments)
    check_first(command).require_baseline()
    from hafl_app.experiments.compare import compare  # takes seconds: not before a typo

    line = shlex.join(["python", "scripts/compare.py", *arguments])
    failed = compare(command, line, lambda text: print(text, flush=True))
    if failed:
        print(f"error: {failed} runs failed, see above and their run.log", file=sys.stderr)
    return FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
