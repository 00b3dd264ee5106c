"""Simulate a task in one way, in a process of its own: `python -m ... WAY TASK RESULT`.

Writes the final state to RESULT and its times to RESULT with `.json` behind it.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.simulation_task import SimulationTask, State

Way = Callable[[SimulationTask, Callable[[], None]], State]
RAY = ("flower, model rebuilt", "ours on Ray")
NAMES = ("loop", "pfl", *RAY, "ours in process")


def way_named(name: str) -> Way:
    """Return a way, and import only its own needs: its imports weigh in its memory."""
    from benchmarks.simulation_loop import run_loop, run_pfl

    if name in {"loop", "pfl"}:
        return run_loop if name == "loop" else run_pfl
    if name == "ours in process":
        from benchmarks.simulation_ours import run_inprocess

        return run_inprocess
    from benchmarks.simulation_flower import (
        run_flower_rebuilt,
        run_ours_on_ray,
    )

    return run_ours_on_ray if name == "ours on Ray" else run_flower_rebuilt


def main() -> None:
    """Run the way that the command line names."""
    name, task, result = sys.argv[1], SimulationTask.from_json(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    way = way_named(name)
    started, ends = time.perf_counter(), list[float]()
    Path(f"{result}.started").touch()
    state = way(task, lambda: ends.append(time.perf_counter()))
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, result)
    rounds = [end - start for start, end in pairwise(ends)]
    times = {"first_round": ends[0] - started, "rounds": rounds}
    Path(f"{result}.json").write_text(json.dumps(times), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # Ray takes seconds to stop, and what it started goes with it


if __name__ == "__main__":
    main()
