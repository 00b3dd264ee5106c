"""Faults and kills, on purpose: `python scripts/chaos.py seed=0 bad=0.1`.

Runs conf/experiment/chaos.yaml without faults, and again with a seeded share of faulty replies and
a server that is killed and resumed; then with clients that flip the sign of what they learn,
without and with a robust rule. Before that, nodes with hostile profiles and runs with hostile
settings are tried without training. Prints what was injected, what was noticed and what it cost,
and fails if a malformed reply went unnoticed, a round was lost, or accuracy fell. Arguments:

    seed=0              of the runs, the faults and the kills
    bad=0.1             share of faulty replies
    kills=3             how often the server is killed
    flippers=0.2        share of clients that flip signs (0: leave these runs out)
    robust=median       or trimmed_mean
    experiment=chaos    file of conf/experiment
    output_dir=FOLDER   where to write

All other arguments are Hydra overrides that hold for every run.
"""

import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import FAILED, run_program  # noqa: E402


def main() -> int:
    """Check the command line, run, and say what was noticed."""
    return run_program(__doc__, _chaos)


def _chaos(arguments: list[str]) -> int:
    from chaos_suite.command import check_first, parse_command

    command = parse_command(arguments)
    check_first(command)
    from chaos_suite.suite import chaos  # takes seconds: not before a typo

    line = shlex.join(["python", "scripts/chaos.py", *arguments])
    problems = chaos(command, line, lambda text: print(text, flush=True))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return FAILED if problems else 0


if __name__ == "__main__":
    sys.exit(main())
