"""Measure memory and time of a round of many clients, folded as they arrive and all at once.

TinyLlama-sized factors by default (rank 16, 9 MB a client), each case in a process of its own.
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import run_script  # noqa: E402


def main() -> int:
    """Measure every case, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["hafl", "flexlora"], metavar="NAME")
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 1000], metavar="N")
    parser.add_argument("--at-once", type=int, nargs="*", default=[100], metavar="N")
    parser.add_argument("--layers", type=int, default=22, metavar="N")
    parser.add_argument("--divide", type=int, default=1, metavar="N", help="narrower layers")
    parser.add_argument("--rank", type=int, default=16, metavar="R")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    return run_script(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> int:
    from benchmarks.timing import describe, machine, table, write_json

    where = machine() | {"threads": options.threads}
    print(describe(where), flush=True)
    cases = [
        (method, count, streaming)
        for method in options.methods
        for streaming, counts in ((True, options.clients), (False, options.at_once))
        for count in counts
    ]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        for case in cases:
            row = process.submit(_apart, vars(options), *case).result()
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append(row)
    print(f"\n{table(rows)}")
    if options.json:
        write_json(options.json, {"machine": where, "cases": rows})
    return 0


def _apart(*case: Any) -> dict[str, Any]:
    """Measure a case in a process of its own, forked when all is imported and nothing computed."""
    import benchmarks.streaming  # noqa: F401

    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as process:
        return process.submit(_one, *case).result()


def _one(options: dict[str, Any], method: str, count: int, streaming: bool) -> dict[str, Any]:
    import torch
    from benchmarks.streaming import check_same, measure_round, shapes_of

    torch.set_num_threads(options["threads"])
    check_same(method, shapes_of(1, 16), (4,))
    shapes = shapes_of(options["layers"], options["divide"])
    cost = measure_round(method, shapes, options["rank"], count, streaming=streaming)
    return {
        "method": method,
        "replies": "streamed" if streaming else "at once",
        "clients": count,
        "memory above before, MB": f"{cost.memory_mb:.0f}",
        "seconds": f"{cost.seconds:.1f}",
    }


if __name__ == "__main__":
    sys.exit(main())
