"""Show where the time of a run goes: seconds by phase as a table and, with --plot, a bar chart.

    python scripts/bench_run.py dataset=banking77 dataset.path=FOLDER --plot phases.png

Other arguments are settings, as for scripts/simulate.py. The run takes place in this process
(engine=inprocess), and its folder is temporary unless output_dir= names one.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import run_script  # noqa: E402
from hafl_app.config.compose import compose, quoted  # noqa: E402


def main() -> int:
    """Run, and print and write what each phase took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", nargs="*", metavar="KEY=VALUE", help="settings of the run")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG of a bar for each phase")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    return run_script(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> int:
    overrides = [*options.setting, "engine=inprocess"]
    settings = compose(overrides)  # a mistake is answered at once
    from benchmarks.run_phases import draw, measure, rows
    from benchmarks.timing import describe, machine, table, write_json

    with TemporaryDirectory() as folder:
        if settings.output_dir is None:
            overrides.append(f"output_dir={quoted(Path(folder) / 'run')}")
        spent = measure(overrides)
    where = machine()
    print(f"\n{describe(where)}\n\n{table(rows(spent))}")
    if options.plot:
        draw(spent, options.plot, f"Seconds of a run by phase, {where['processor']}")
        print(f"\nWritten: {options.plot}")
    if options.json:
        phases = {phase: asdict(seconds) for phase, seconds in spent.items()}
        write_json(options.json, {"machine": where, "settings": options.setting, "phases": phases})
    return 0


if __name__ == "__main__":
    sys.exit(main())
