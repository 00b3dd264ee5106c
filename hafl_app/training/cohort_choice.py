"""The number of clients that train together, chosen by a measurement on the run's own clients."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from hafl_app.training.cohort import train_cohort
from hafl_app.training.device import resolve_precision
from hafl_app.training.local import train
from hafl_app.training.lora_model import LoraModel
from hafl_app.training.task import Task, TrainResult

CHOSEN_CLIENTS = 16
"""Clients of a cohort that is not given by number."""

_PAYS_FROM = 1.1  # times as fast as one at a time
_STEPS, _REPEATS = 2, 2
_MEASURED = {"cpu": 4, "cuda": 16}  # clients; more cost time
_MOST_OF_RUN = {"cpu": 0.02, "cuda": 0.2}  # where it pays little, finding that out must cost less
_COMPARED = 4  # clients
_SAME_LOSS = {"fp32": 1e-3, "bf16": 3e-2}  # relative, after two steps


@dataclass(frozen=True)
class CohortChoice:
    """The number of clients that train together in a run.

    Parameters
    ----------
    clients
        At least 1; 1 is one at a time.
    reason
        Why, in a few words.
    speedup
        Time of one at a time over that of a cohort; None if it was not measured.
    """

    clients: int
    reason: str
    speedup: float | None = None


def steps_of(task: Task) -> int:
    """Return the optimizer steps that a client's training takes at most."""
    plan = task.plan
    steps = plan.local_epochs * math.ceil(len(task.examples.labels) / task.options.batch_size)
    return min(steps, plan.max_steps) if plan.max_steps else steps


def too_short(device: torch.device, steps: int) -> str:
    """Say why a run with so many steps of clients is not worth a measurement; empty if it is."""
    turns = 2 * (1 + _REPEATS)  # both ways, and once to warm up
    measured = turns * _MEASURED[device.type] * _STEPS
    if steps * _MOST_OF_RUN[device.type] >= measured:
        return ""
    return f"{steps:,} steps of clients in all are too few to measure what pays"


def choose(model: LoraModel, tasks: Sequence[Task]) -> CohortChoice:
    """Measure a few steps of some clients together and one at a time.

    Parameters
    ----------
    tasks
        At least two; they may train together, see `hafl_app.training.cohort.obstacle`.
    """
    kind = model.device.type
    few = [_shortened(task) for task in tasks[: _MEASURED[kind]]]
    one_at_a_time, joint = _seconds(model, few)
    speedup = round(one_at_a_time / joint, 2)
    if speedup < _PAYS_FROM:
        return CohortChoice(1, f"{speedup:g} times as fast together, too little to pay", speedup)
    return CohortChoice(CHOSEN_CLIENTS, f"{speedup:g} times as fast together", speedup)


def differ(model: LoraModel, tasks: Sequence[Task]) -> str:
    """Say how a few steps of some clients together differ from one at a time; empty if not.

    A base model that does not keep rows in their order would mix up the clients.
    """
    few = [_shortened(task) for task in tasks[:_COMPARED]]
    for task, joint in zip(few, train_cohort(model, few), strict=True):
        if joint is None:
            continue
        alone = _alone(model, task)
        precision = resolve_precision(task.options.precision, model.device)
        if not abs(joint.loss - alone.loss) <= _SAME_LOSS[precision] * abs(alone.loss):
            return f"the loss is {joint.loss:.6g} together and {alone.loss:.6g} alone"
    return ""


def _seconds(model: LoraModel, tasks: Sequence[Task]) -> tuple[float, float]:
    """Return the least time of these trainings one at a time, and together."""

    def one_at_a_time() -> object:
        return [_alone(model, task) for task in tasks]

    def joint() -> object:
        return train_cohort(model, tasks)

    for way in (one_at_a_time, joint):
        way()  # warms up
    turns = [(_timed(model, one_at_a_time), _timed(model, joint)) for _ in range(_REPEATS)]
    return min(alone for alone, _ in turns), min(together for _, together in turns)


def _timed(model: LoraModel, way: Callable[[], object]) -> float:
    # Others on the machine disturb CPU time least; of several threads it says little.
    on_cuda = model.device.type == "cuda"
    clock = time.perf_counter if on_cuda or torch.get_num_threads() > 1 else time.process_time
    if on_cuda:
        torch.cuda.synchronize(model.device)
    started = clock()
    way()
    if on_cuda:
        torch.cuda.synchronize(model.device)
    return clock() - started


def _alone(model: LoraModel, task: Task) -> TrainResult:
    return train(
        *(model, task.adapter, task.plan, task.examples, task.options, task.seed),
        correction=task.correction,
    )


def _shortened(task: Task) -> Task:
    return replace(task, plan=replace(task.plan, local_epochs=1, max_steps=_STEPS, probe_batches=0))
