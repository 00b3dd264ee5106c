"""Count the bytes that HAFLQ's ten clients upload in a round, by distance and rank.

MiniLM's adapted layers; beside HAFL in float32 and in int8, for each time that an upload may take.
Every message is read by the other side first, which must get what was meant.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import run_script  # noqa: E402


def main() -> int:
    """Measure every client, and print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.5, 1.0, 2.0], metavar="S")
    parser.add_argument("--layers", type=int, choices=range(1, 7), default=2, metavar="1-6")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    return run_script(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from benchmarks.bytes import minilm_shapes
    from benchmarks.haflq import measure_clients, summary
    from benchmarks.timing import describe, machine, table, write_json

    where, measured = machine(), {}
    print(describe(where), flush=True)
    for seconds in options.seconds:
        clients = list(measure_clients(seconds, minilm_shapes(options.layers)))
        print(f"\nstrategy.upload_seconds={seconds:g}\n\n{table([c.row() for c in clients])}\n")
        print(summary(clients), flush=True)
        measured[seconds] = [asdict(client) for client in clients]
    if options.json:
        write_json(options.json, {"machine": where, "clients": measured})
    return 0


if __name__ == "__main__":
    sys.exit(main())
