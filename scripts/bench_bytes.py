"""Count the bytes of a round's messages beside those of the factors' numbers alone.

MiniLM's adapted layers, a client of each rank, each method, both ways, and every format of uploads.
Every message is read by the other side first, which must get what was meant.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import run_script  # noqa: E402


def main() -> int:
    """Measure every case, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64], metavar="R")
    formats = ("fp32", "bf16", "int8")
    parser.add_argument("--uploads", nargs="+", choices=formats, default=formats)
    parser.add_argument("--layers", type=int, choices=range(1, 7), default=6, metavar="1-6")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    return run_script(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from benchmarks.bytes import METHODS, measure_all, minilm_shapes
    from benchmarks.timing import describe, machine, table, write_json

    methods = options.methods or list(METHODS)
    if unknown := set(methods) - set(METHODS):
        raise ValueError(f"--methods {sorted(unknown)}: expected some of {sorted(METHODS)}")
    shapes, max_rank = minilm_shapes(options.layers), max(options.ranks)
    where = machine()
    print(describe(where), flush=True)
    measured = list(measure_all(methods, options.ranks, options.uploads, shapes, max_rank))
    print(table([one.row() for one in measured]))
    if options.json:
        write_json(options.json, {"machine": where, "messages": [asdict(one) for one in measured]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
