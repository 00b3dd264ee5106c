"""Measure the CPU time until a command answers: a refusal, and a run's first training step.

    python scripts/bench_start.py experiment=demo

Arguments are settings of the run; it is in process. Each repeat is a process of its own, from its
start, imports included. Scoring the untrained model comes before the first step, hence the row
without it.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import run_script  # noqa: E402

REFUSED = ("federation.num_round=3", "client.learning_rate=-1", "strategy.learning_rate=-1")


def main() -> int:
    """Measure every start, and print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", help="of the run")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    return run_script(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> int:
    from benchmarks.start import Start, first_step, refusal, summary
    from benchmarks.timing import describe, machine, table, write_json

    where = machine()
    print(describe(where), flush=True)
    unscored = [*options.settings, "federation.central_evaluation=false"]
    cases: dict[str, Callable[[], Start]] = {
        **{f"{setting} is refused": partial(refusal, [setting]) for setting in REFUSED},
        "first step": partial(first_step, options.settings),
        "first step, nothing scored": partial(first_step, unscored),
    }
    found: dict[str, list[Start]] = {name: [] for name in cases}
    for _ in range(options.repeats):
        for name, case in cases.items():
            found[name].append(case())
            print(f"{name}: {found[name][-1].cpu_s:.2f} s", flush=True)
    rows = [{"until": name} | summary(starts) for name, starts in found.items()]
    print(f"\n{table(rows)}")
    if options.json:
        write_json(options.json, {"machine": where, "starts": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
