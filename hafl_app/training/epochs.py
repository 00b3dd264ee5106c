"""Passes over a client's data, a step for every batch, within the limits of its training."""

from collections.abc import Callable, Generator, Iterator

import numpy as np
from numpy.typing import NDArray

from hafl_app.training.batches import gathered, training_batches
from hafl_app.training.drift_correction import DriftCorrection
from hafl_app.training.importance_meter import ImportanceMeter
from hafl_app.training.optimizer import Rates, build_optimizer, parameters, take_step
from hafl_app.training.proximal import ProximalTerm
from hafl_app.training.task import LossNotFiniteError, Task, Wanted
from hafl_app.training.trainee import Trainee


class Allowance:
    """Limits of a training: the plan's steps, and the client's time."""

    def __init__(
        self, max_steps: int, max_seconds: float, started: float, clock: Callable[[], float]
    ) -> None:
        self._clock = clock
        self._max_steps = max_steps
        self._max_seconds = max_seconds
        self._started = started
        self.out_of_time = False

    def of_probe(self, max_steps: int) -> "Allowance":
        """Return a probe's limits: steps of its own, and the time that there is for everything."""
        return Allowance(max_steps, self._max_seconds, self._started, self._clock)

    def is_spent(self, steps: int) -> bool:
        """Whether no further step may be taken; to be asked only when there is one to take."""
        if self._max_steps and steps >= self._max_steps:
            return True
        # Without a single step the reply would bring nothing.
        if steps and self._max_seconds:
            self.out_of_time = self._clock() - self._started >= self._max_seconds
        return self.out_of_time


def optimize(
    task: Task,
    trainee: Trainee,
    meter: ImportanceMeter,
    allowance: Allowance,
    on_epoch: Callable[[int, float], None] | None,
) -> Generator[Wanted, float, tuple[float, int]]:
    """Train; return the mean loss of the last epoch with a step in it, and the steps."""
    plan, options = task.plan, task.options
    optimizer, rng = build_optimizer(trainee, plan, options), np.random.default_rng(task.seed)
    proximal = ProximalTerm(parameters(optimizer), plan.proximal)
    correction = DriftCorrection(trainee, task.correction)
    rates = Rates(optimizer, plan, len(task.examples.labels))
    steps, seen, losses = 0, 0, [0.0]
    for epoch in range(plan.local_epochs):
        if allowance.is_spent(steps):
            break  # before the losses of the last epoch with a step are gone
        trainee.train()
        losses = []
        for rows in _steps_of_epoch(task, trainee, rng):
            if allowance.is_spent(steps):
                break
            rates.before_step(steps, seen)
            losses.append((yield Wanted(trainee, rows, plan.tail)))
            meter.update(trainee)  # what the data say, not what keeps near
            proximal.add_gradient()
            correction.add_gradient()
            take_step(optimizer, options.max_grad_norm)
            steps, seen = steps + 1, seen + len(rows)
            if not np.isfinite(losses[-1]):
                raise LossNotFiniteError(
                    f"the loss is {losses[-1]} in step {steps}, epoch {epoch + 1}"
                )
        if on_epoch is not None:
            on_epoch(epoch + 1, float(np.mean(losses or [0.0])))
    return float(np.mean(losses or [0.0])), steps


def _steps_of_epoch(
    task: Task, trainee: Trainee, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Return the rows of every step of an epoch."""
    examples, least = task.examples, task.options.tokens_per_step
    batches = training_batches(examples, task.options.batch_size, rng)
    if not least:
        return batches
    return gathered(batches, examples, lambda rows: trainee.num_targets(examples, rows), least)
