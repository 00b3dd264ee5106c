"""Federations that kill themselves with SIGKILL, one in each of `PHASES`.

`killed_run.py FOLDER OVERRIDE...` writes the run of a phase to FOLDER/PHASE, and then how each of
the processes ended to FOLDER/ended.json.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hafl_app.client import handlers
from hafl_app.engines.in_process import run_federation
from hafl_app.reports.figures import curves
from hafl_app.run.evaluation import CentralEvaluation
from hafl_app.server import checkpoint_store as checkpoint
from hafl_app.strategies.hafl import Hafl
from hafl_app.tracking.base import Trackers


def kill_at(call_number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, which does not return from its call of that number."""
    calls = []

    def killing(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        result = function(*args, **kwargs)
        if len(calls) == call_number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return killing


# What is interrupted in round 2 of 3, with 5 clients; round 0 has an evaluation and a checkpoint.
PHASES: dict[str, tuple[Any, str, int]] = {
    "training": (handlers, "train_locally", 8),
    "fold": (Hafl, "accumulate", 8),
    "evaluation": (CentralEvaluation, "_score_on", 6),
    "trackers": (Trackers, "log_round", 3),
    # The sixth: one of metrics.jsonl, two of each checkpoint before, this one's file.
    "checkpoint": (os, "fsync", 6),
    # The sixth: of each checkpoint first the file, then, after the renaming, its folder.
    "rename": (checkpoint, "_sync", 6),
    "results": (curves, "draw_curves", 1),
}


def die_in(phase: str, overrides: list[str]) -> None:
    """Run the federation until it dies."""
    torch.set_num_threads(1)
    owner, name, number = PHASES[phase]
    with mock.patch.object(owner, name, kill_at(number, getattr(owner, name))):
        run_federation(overrides)


def main() -> None:
    """Fork a process for each phase: all has been imported, and nothing been computed yet."""
    folder, overrides = Path(sys.argv[1]), sys.argv[2:]
    ended = {}
    for phase in PHASES:
        pid = os.fork()
        if not pid:
            try:
                die_in(phase, [*overrides, f"output_dir={folder / phase}"])
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        ended[phase] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    (folder / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
