"""Clients per second: trained one at a time, and in cohorts of several that share their passes.

Needs torch, transformers and peft, and of this package `lowrank`, `plan` and `training` alone.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.timing import DisagreementError, Timing, time_in_turn
from benchmarks.training import Case, Client, Texts, synchronized_clock
from hafl_app.lowrank.factors import Adapter
from hafl_app.training.cohort import obstacle, obstacle_of, train_cohort
from hafl_app.training.local import train
from hafl_app.training.task import Task, TrainResult

TOLERANCE = 1e-4  # of the norm of what training changed, in float32
ONE_AT_A_TIME = "one at a time"
NOT_MEASURED = "not measured"


def shares_of(texts: Any, number: int) -> list[Texts]:
    """Return equal shares of texts, one after another."""
    size = len(texts.labels) // number
    shares = []
    for first in range(0, number * size, size):
        offsets = texts.offsets[first : first + size + 1]
        tokens = texts.tokens[offsets[0] : offsets[-1]]
        shares.append(Texts(tokens, offsets - offsets[0], texts.labels[first : first + size]))
    return shares


def tasks_of(client: Client, texts: Sequence[Any], rank: int) -> list[Task]:
    """Return trainings of equal clients of one rank, each with texts of its own."""
    case = Case(rank, rank)
    adapter, plan = case.adapter(client.model), case.plan(client.model)
    return [Task(adapter, plan, own, client.options, seed) for seed, own in enumerate(texts)]


def check(client: Client, tasks: Sequence[Task]) -> None:
    """Check that clients change their factors together as one at a time, in float32.

    Plain SGD: Adam divides a gradient by its size, so that one of rounding alone counts in full.

    Raises
    ------
    DisagreementError
        If something stands against a cohort, or a client's factors differ by more than 1e-4 of the
        norm of their change.
    """
    options = replace(client.options, optimizer="sgd", precision="fp32", learning_rate=0.1)
    tasks = [replace(task, options=options) for task in tasks]
    if why_not := obstacle_of(client.model) or obstacle(options):
        raise DisagreementError(f"these clients cannot train together: {why_not}")
    for number, (task, joint) in enumerate(
        zip(tasks, _train(client, tasks, len(tasks)), strict=True)
    ):
        alone = _alone(client, task)
        change = _distance(alone.adapter, task.adapter)
        error = _distance(alone.adapter, joint.adapter) / change
        if not error <= TOLERANCE:
            raise DisagreementError(
                f"client {number} of {len(tasks)} together: its factors differ by {error:.2g} of "
                f"their change, expected at most {TOLERANCE:g}"
            )


def measure(
    client: Client, tasks: Sequence[Task], sizes: Sequence[int], repeats: int
) -> dict[str, Timing]:
    """Time the training of all these clients one at a time, and in cohorts of every size.

    On the CPU, CPU time is counted, which others on the machine disturb least; use one thread.

    Returns
    -------
    dict of str to Timing
        Seconds per client: of `ONE_AT_A_TIME`, and of every size as a word.
    """

    def cohorts(size: int) -> Callable[[], object]:
        return lambda: _train(client, tasks, size)

    jobs: dict[str, Callable[[], object]] = {
        ONE_AT_A_TIME: lambda: [_alone(client, task) for task in tasks]
    }
    jobs |= {str(size): cohorts(size) for size in sizes}
    clock = time.process_time if client.model.device.type == "cpu" else synchronized_clock
    timings = time_in_turn(jobs, repeats, clock=clock, patience_s=120.0)
    return {
        way: Timing(tuple(seconds / len(tasks) for seconds in timing.seconds))
        for way, timing in timings.items()
    }


def rows(timings: dict[str, Timing], **case: object) -> list[dict[str, object]]:
    """Return the lines of a table, with the speed over one at a time."""
    alone = timings[ONE_AT_A_TIME].median
    return [
        {
            **case,
            "cohort": way,
            "ms a client": str(timing),
            "clients/s": f"{1 / timing.median:.3g}",
            "times as fast": f"{alone / timing.median:.2f}",
        }
        for way, timing in timings.items()
    ]


def unmeasured(sizes: Sequence[int], **case: object) -> list[dict[str, object]]:
    """Return the table's lines where there is no device."""
    missing = dict.fromkeys(("ms a client", "clients/s", "times as fast"), NOT_MEASURED)
    return [{**case, "cohort": way, **missing} for way in (ONE_AT_A_TIME, *map(str, sizes))]


def _alone(client: Client, task: Task) -> TrainResult:
    return train(client.model, task.adapter, task.plan, task.examples, task.options, task.seed)


def _train(client: Client, tasks: Sequence[Task], size: int) -> list[TrainResult]:
    results: list[TrainResult] = []
    for start in range(0, len(tasks), size):
        for result in train_cohort(client.model, tasks[start : start + size]):
            if result is None:
                raise DisagreementError(f"a client was left out of a cohort of {size}")
            results.append(result)
    return results


def _distance(one: Adapter, other: Adapter) -> float:
    """Return the norm of the difference of all factors, in float64."""
    pairs = [(factors, other.modules[name]) for name, factors in one.modules.items()]
    squares = [
        (mine.double() - its.double()).square().sum()
        for left, right in pairs
        for mine, its in ((left.lora_A, right.lora_A), (left.lora_B, right.lora_B))
    ]
    return float(torch.stack(squares).sum().sqrt())
