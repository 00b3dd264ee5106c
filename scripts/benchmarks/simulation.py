"""Times, memory and results of several ways to simulate one task, each in a process of its own."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from safetensors.torch import load_file

from benchmarks.simulation_loop import has_pfl
from benchmarks.simulation_task import SimulationTask, State
from benchmarks.simulation_worker import NAMES
from benchmarks.timing import DisagreementError, Timing
from hafl_app.engines.processes import HOME_PREFIX, run_environment, stop_processes

LIMIT = "loop"
_TOLERANCE = 1e-5
_POLL_SECONDS = 0.05
_COPIES = 4
_SCRIPTS = Path(__file__).resolve().parents[1]
_WORKER = "benchmarks.simulation_worker"


@dataclass
class Run:
    """Result, times and memory of one process.

    Parameters
    ----------
    first_round
        Seconds from the end of its imports to the end of its first round.
    rounds
        Seconds of each round after the first.
    imports_mb, peak_mb
        Memory of the process and all it started, shared pages in parts (PSS), 10^6 bytes: after
        the imports, and at the most. 0 if it was not watched.
    """

    state: State
    first_round: float
    rounds: list[float]
    imports_mb: float = 0.0
    peak_mb: float = 0.0


@dataclass
class Measurement:
    """Times and memory of one way; see `Run`."""

    first_rounds: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)
    imports_mb: float = 0.0
    peak_mb: float = 0.0

    def overhead(self, limit: "Measurement", num_clients: int) -> float:
        """Return the milliseconds per client above the limit, from the fastest rounds."""
        return (min(self.rounds) - min(limit.rounds)) * 1e3 / num_clients


def report(
    tasks: Mapping[str, SimulationTask],
    wanted: Sequence[str],
    installed: Sequence[str],
    repeats: int,
) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """Measure tasks one after another; yield each one's name and its table, a row a way.

    Parameters
    ----------
    wanted
        Names of ways; those that are not installed get a row of "not installed".
    installed
        See `ways`.
    repeats
        See `measure`.
    """
    for title, task in tasks.items():
        measured = measure(task, installed, repeats)
        yield title, [_row(name, task, measured) for name in dict.fromkeys([LIMIT, *wanted])]


def _row(name: str, task: SimulationTask, measured: Mapping[str, Measurement]) -> dict[str, object]:
    titles = (
        *("ms per client", "overhead, ms per client", "overhead / copies", "time / loop"),
        *("first round after imports, s", "memory, MB", "memory / loop"),
    )
    if name not in measured:
        return {"way": name, **dict.fromkeys(titles, "not installed")}
    one, limit = measured[name], measured[LIMIT]
    overhead, copies = one.overhead(limit, task.num_clients), copying_ms(task.payload_bytes)
    values = (
        str(Timing(tuple(s / task.num_clients for s in one.rounds))),
        f"{overhead:.3g}",
        f"{overhead / copies:.2f}" if copies else "-",
        f"{min(one.rounds) / min(limit.rounds):.3g}",
        f"{min(one.first_rounds):.2g}",
        f"{one.peak_mb:.0f}",
        f"{one.peak_mb / limit.peak_mb:.2f}",
    )
    return {"way": name, **dict(zip(titles, values, strict=True))}


def copying_ms(payload_bytes: int) -> float:
    """Time the copies of a payload in and out of a message both ways: four in all."""
    if not payload_bytes:
        return 0.0
    payload, best = np.ones(payload_bytes, np.uint8), float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(_COPIES):
            payload.copy()
        best = min(best, time.perf_counter() - started)
    return best * 1e3


def ways(names: Sequence[str] = NAMES) -> list[str]:
    """Return the installed ones of these ways, the limit among them and first."""
    there = [name for name in names if name != LIMIT and (name != "pfl" or has_pfl())]
    return [LIMIT, *there]


def measure(
    task: SimulationTask,
    names: Sequence[str],
    repeats: int,
    run: Callable[[str, SimulationTask, bool], Run] | None = None,
) -> dict[str, Measurement]:
    """Run the task in every way, check that all results are equal, then time them in turn.

    Parameters
    ----------
    names
        From `ways`.
    repeats
        Processes of each after the first one, whose memory is watched and whose times do not
        count, at least 1.
    run
        Runs a way in a process and watches its memory if asked to: `run_apart`.

    Raises
    ------
    DisagreementError
        If a way ends with another adapter than the loop.
    """
    run = run or run_apart
    measured = {}
    states: dict[str, State] = {}
    for name in names:
        watched = run(name, task, True)
        states[name] = watched.state
        measured[name] = Measurement(imports_mb=watched.imports_mb, peak_mb=watched.peak_mb)
    check_agreement(states)
    for turn in range(repeats):
        shift = turn % len(names)
        for name in [*names[shift:], *names[:shift]]:
            timed = run(name, task, False)
            measured[name].first_rounds.append(timed.first_round)
            measured[name].rounds += timed.rounds
    return measured


def check_agreement(states: Mapping[str, State]) -> None:
    """Refuse final adapters of which a tensor differs by more than 1e-5 of the loop's largest.

    Raises
    ------
    DisagreementError
        Naming the way.
    """
    right = states[LIMIT]
    for name, state in states.items():
        if state.keys() != right.keys():
            odd = sorted(state.keys() ^ right.keys())
            raise DisagreementError(f"{name}: tensors differ from the loop's: {odd[:3]}")
        for key, tensor in right.items():
            error, largest = float((state[key] - tensor).abs().max()), float(tensor.abs().max())
            if not error <= _TOLERANCE * largest:
                raise DisagreementError(
                    f"{name} leaves a difference of {error:.3g} to the loop in {key}, whose "
                    f"largest number is {largest:.3g}"
                )


def run_apart(name: str, task: SimulationTask, watch: bool) -> Run:
    """Run a way in a process of its own.

    Raises
    ------
    RuntimeError
        If it fails; with the end of what it wrote.
    """
    token = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix=HOME_PREFIX) as folder:
        result, log = Path(folder) / "state", Path(folder) / "log"
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", _WORKER, name, task.to_json(), str(result)],
                stdout=output,
                stderr=output,
                env=_environment(Path(folder), token),
            )
            try:
                imports, peak = _watch(process, result) if watch else (0.0, 0.0)
                process.wait()
            finally:
                stop_processes(token)  # Ray's daemons included
        times = Path(f"{result}.json")
        if not times.exists():
            raise RuntimeError(f"{name} failed: {log.read_text(encoding='utf-8')[-2000:]}")
        measured = json.loads(times.read_text(encoding="utf-8"))
        return Run(load_file(result), measured["first_round"], measured["rounds"], imports, peak)


def _environment(home: Path, token: str) -> dict[str, str]:
    """Return a process's environment: one thread, and both packages, for Ray's workers as well."""
    inherited = os.environ.get("PYTHONPATH")
    paths = [str(_SCRIPTS.parent), str(_SCRIPTS), *([inherited] if inherited else [])]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return run_environment(home, token) | own


def _watch(process: "subprocess.Popen[bytes]", result: Path) -> tuple[float, float]:
    """Return the memory after the imports and at its most, in MB, until the process ends."""
    imports = peak = 0.0
    while process.poll() is None:
        before = time.perf_counter()
        now = tree_memory(process.pid)
        if not Path(f"{result}.started").exists():
            imports = now
        peak = max(peak, now)
        # The look walks all pages of Ray's processes: a third of a processor is enough for it.
        time.sleep(max(_POLL_SECONDS, 2 * (time.perf_counter() - before)))
    return imports, peak


def tree_memory(pid: int) -> float:
    """Return the PSS of a process and its children, in 10^6 bytes; 0 if it is gone."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_full_info().pss / 1e6
    return total
