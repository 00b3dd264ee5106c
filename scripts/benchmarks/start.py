"""Starts of commands, each in a process of its own; run as a module it is a run's first step.

`python -m benchmarks.start SETTING...` runs `scripts/simulate.py` in process up to the end of its
first training step, and writes what that took to the file of ``$FIRST_STEP``.
"""

import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

SCRIPTS = Path(__file__).resolve().parents[1]
SIMULATE = SCRIPTS / "simulate.py"
_RESULT = "FIRST_STEP"


@dataclass(frozen=True)
class Start:
    """What a process needed until it got there.

    Parameters
    ----------
    cpu_s
        User and system time of all its threads, in seconds, from the start of the process.
    modules
        Names of the imported modules, if they are known.
    """

    cpu_s: float
    modules: tuple[str, ...] = ()


def refusal(settings: Sequence[str]) -> Start:
    """Return what `simulate.py` takes to refuse settings.

    Raises
    ------
    RuntimeError
        If it does not.
    """
    before = _children_s()
    done = subprocess.run(
        [sys.executable, str(SIMULATE), *settings], capture_output=True, text=True, check=False
    )
    if done.returncode != 2:
        raise RuntimeError(f"{' '.join(settings)}: not refused: {done.stderr[-500:]}")
    return Start(_children_s() - before)


def first_step(settings: Sequence[str]) -> Start:
    """Return what a run in this process's environment takes until its first training step.

    Raises
    ------
    RuntimeError
        If there is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "start.json"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "benchmarks.start", *settings),
                *("engine=inprocess", f"output_dir={folder}/run"),
            ],
            cwd=SCRIPTS,
            env=os.environ | {_RESULT: str(result)},
            capture_output=True,
            text=True,
            check=False,
        )
        if not result.exists():
            raise RuntimeError(f"no training step: {done.stderr[-500:]}")
        found = json.loads(result.read_text())
    return Start(found["cpu_s"], tuple(found["modules"]))


def summary(starts: Sequence[Start]) -> dict[str, str]:
    """Return a row of a table: median and range of the seconds, and the number of modules."""
    seconds = [start.cpu_s for start in starts]
    modules = len(starts[-1].modules)
    return {
        "CPU s": f"{np.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})",
        "modules": f"{modules:,}" if modules else "-",
    }


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _run_to_first_step() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def stop(*_: Any) -> None:
        start = Start(time.process_time(), tuple(sorted(sys.modules)))
        Path(os.environ[_RESULT]).write_text(json.dumps(asdict(start)))
        os._exit(0)

    register_optimizer_step_post_hook(stop)
    sys.argv[0] = str(SIMULATE)
    runpy.run_path(str(SIMULATE), run_name="__main__")


if __name__ == "__main__":
    _run_to_first_step()
