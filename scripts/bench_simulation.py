"""Time simulations of one federated LoRA task: a bare loop, pfl, Flower on Ray, and this project.

Every way must first end with the same adapter. Each runs in processes of its own, in turn, on one
thread. pfl is optional: pip install --no-deps pfl==0.6.0 prv-accountant==0.2.0 multiprocess
"""

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import run_script  # noqa: E402

# About 100 ms a client on one thread of an idle core.
TRAINING = (
    *("model=tiny_random", "dataset=synthetic", "dataset.num_train=4000", "dataset.num_test=20"),
    *("client.batch_size=8", "client.learning_rate=1.0", "partition=dirichlet"),
)
PER_CLIENT = 180  # examples, for 100 ms
SMALL = ("dataset.num_train=9000", "dataset.num_test=20", "client.batch_size=8")


def main() -> int:
    """Measure every task, and print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--payloads", type=float, nargs="*", default=[0.3, 4, 16], metavar="MB")
    parser.add_argument("--no-training", action="store_true", help="only clients that do nothing")
    parser.add_argument("--harness", nargs="+", metavar="WAY", help="such as 'ours in process' pfl")
    parser.add_argument("--no-ray", action="store_true", help="leave out what starts Ray")
    parser.add_argument("--clients", type=int, default=20, metavar="N")
    parser.add_argument("--rounds", type=int, default=6, metavar="N")
    parser.add_argument("--repeats", type=int, default=2, metavar="N")
    parser.add_argument("--settings", nargs="*", default=[], help="of the clients that train")
    parser.add_argument("--costs", action="store_true", help="what each step of a round costs")
    parser.add_argument("--scale", action="store_true", help="cost against registered clients")
    parser.add_argument("--priority", action="store_true", help="niceness of Ray's workers")
    parser.add_argument("--pairs", type=int, default=12, metavar="N", help="of --priority")
    parser.add_argument("--registered", type=int, nargs="+", default=[10, 100, 1000, 10000])
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG of the costs of --scale")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.priority:
        return run_script(lambda: _priority(options))
    measure = _scale if options.scale else _costs if options.costs else _measure
    return run_script(lambda: measure(options))


def _measure(options: argparse.Namespace) -> int:
    from benchmarks.simulation import report, ways
    from benchmarks.simulation_task import SimulationTask
    from benchmarks.simulation_worker import NAMES, RAY

    wanted = [name for name in options.harness or NAMES if not (options.no_ray and name in RAY)]
    for name in set(wanted) - set(NAMES):
        raise ValueError(f"--harness {name}: expected among {', '.join(NAMES)}")
    tasks = _idle(options)
    if not options.no_training:
        settings = (*TRAINING, f"dataset.num_train={PER_CLIENT * options.clients}")
        tasks["training"] = SimulationTask(
            options.clients, options.rounds, 0, (*settings, *options.settings)
        )
    _print(options, report(tasks, wanted, ways(wanted), options.repeats))
    return 0


def _idle(options: argparse.Namespace) -> dict[str, Any]:
    """Return the tasks whose clients do nothing."""
    from benchmarks.simulation_task import SimulationTask

    return {
        f"nothing, {megabytes:g} MB": SimulationTask(
            options.clients, options.rounds, int(megabytes * 1e6)
        )
        for megabytes in options.payloads
    }


def _costs(options: argparse.Namespace) -> int:
    import torch
    from benchmarks.simulation_costs import report

    torch.set_num_threads(1)
    _print(options, report(_idle(options)))
    return 0


def _scale(options: argparse.Namespace) -> int:
    from benchmarks.simulation_scale import REGISTERED, draw_costs, report

    training = () if options.no_training else (*TRAINING[:2], *SMALL, *options.settings)
    tables = _print(options, report(options.registered, options.rounds, training))
    if options.plot:
        draw_costs(tables[REGISTERED], options.plot)
    return 0


def _priority(options: argparse.Namespace) -> int:
    from benchmarks.simulation_priority import report

    _print(options, report((*TRAINING, *options.settings), options.clients, options.pairs))
    return 0


def _print(options: argparse.Namespace, tables: Any) -> dict[str, Any]:
    """Print tables as they come, write them, and return them by name."""
    from benchmarks.timing import describe, machine, table, write_json

    where = machine()
    print(describe(where), flush=True)
    written = {}
    for name, rows in tables:
        print(f"\n{name}\n\n{table(rows)}", flush=True)
        written[name] = rows
    if options.json:
        write_json(options.json, {"machine": where, "tables": written})
    return written


if __name__ == "__main__":
    sys.exit(main())
