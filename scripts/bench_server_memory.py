"""Measure the memory of a server that has a base model's configuration and none of its weights.

Each strategy in a process of its own: started from its settings, a round of a few replies that are
folded as they arrive, a checkpoint and the results.
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
    """Measure every strategy, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategies", nargs="+", metavar="NAME", help="(all that can stream)")
    parser.add_argument(
        "--model",
        nargs="+",
        default=["model=llama_7b_random"],
        metavar="SETTING",
        help="of a causal language model (model=llama_7b_random)",
    )
    parser.add_argument("--rank", type=int, default=16, metavar="R")
    parser.add_argument("--clients", type=int, default=2, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    return run_script(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> int:
    from benchmarks.server_memory import check_same, streaming_strategies
    from benchmarks.timing import describe, machine, table, write_json

    for name in ("rank", "clients"):
        if (value := getattr(options, name)) < 1:
            raise ValueError(f"--{name}: {value}: expected at least 1")
    print(describe(machine()), flush=True)
    # Children of one process that has nothing but the imports.
    clean = get_context("forkserver")
    clean.set_forkserver_preload(["benchmarks.server_memory"])
    refused = streaming_strategies(options.model, options.rank)
    for name in options.strategies or ():
        if name not in refused:
            raise ValueError(f"--strategies {name}: expected one of {', '.join(refused)}")
    rows: list[dict[str, Any]] = []
    for name in options.strategies or refused:
        if refused[name]:
            print(f"{name}: {refused[name]}", flush=True)
            continue
        check_same(name)
        with ProcessPoolExecutor(1, mp_context=clean) as process:
            row = process.submit(_one, name, options.model, options.rank, options.clients).result()
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
    print(f"\n{table(rows)}")
    if options.json:
        write_json(options.json, {"machine": machine(), "strategies": rows})
    return 0


def _one(strategy: str, model: list[str], rank: int, clients: int) -> dict[str, Any]:
    import time

    import torch
    from benchmarks.server_memory import measure

    torch.set_num_threads(1)
    started = time.process_time()
    peak = measure(strategy, model, rank, clients)
    return {
        "strategy": strategy,
        "imports, MB": f"{peak.imports:.0f}",
        "start": f"{peak.start:.0f}",
        "round": f"{peak.rounds:.0f}",
        "end": f"{peak.end:.0f}",
        "CPU s": f"{time.process_time() - started:.0f}",
    }


if __name__ == "__main__":
    sys.exit(main())
