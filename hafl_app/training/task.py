"""One client's training as a task, what it waits for on the way, and its result."""

import functools
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hafl_app.lowrank.factors import Adapter
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.tail_pruning import TailPruning
from hafl_app.training.batches import Examples
from hafl_app.training.own_classes import OwnClasses
from hafl_app.training.settings import TrainOptions
from hafl_app.training.trainee import Trainee
from hafl_app.training.work import Pass


class TrainingError(RuntimeError):
    """Training that cannot go on; nothing of it may be uploaded."""


class LossNotFiniteError(TrainingError):
    """A loss that is infinite or NaN."""


class DeviceMemoryError(TrainingError):
    """The device's memory does not suffice, not even for the least that could be asked of it."""


@dataclass(frozen=True)
class TrainResult:
    """Result of one client's training.

    Parameters
    ----------
    plan
        As it was executed: where the client chooses components, after its choice.
    adapter
        Trained components (`ModulePlan.trainable`, in that order) and head. A pruned module holds
        only the first of them. A factor that is not trained is left out, see
        `hafl_app.lowrank.factors.LoraFactors.only`.
    num_examples
        Texts that the client trains on: its share of the data, which is its weight in averages.
        Steps or time may have ended before all of them took part.
    loss
        Mean training loss of the last epoch, or of the steps in it that were taken.
    steps
        Optimizer steps.
    seconds
        Wall time of the training.
    probe_seconds
        Of which the probe of all held components. It changes nothing that is trained, but may
        choose it.
    peak_memory_mb
        See `hafl_app.training.device.peak_memory_mb`.
    importance
        Module name to the scores of its trained components (of all held ones after a probe).
    micro_batch_size
        Texts that went through the model at once: the batch size, or less where memory was short.
    out_of_time
        Whether ``max_seconds`` were over before the plan was done.
    passes
        Rows that went forward and back through the model, by plan and length.
    """

    plan: TrainPlan
    adapter: Adapter
    num_examples: int
    loss: float
    steps: int
    seconds: float
    probe_seconds: float
    peak_memory_mb: float
    importance: Mapping[str, Tensor]
    micro_batch_size: int
    out_of_time: bool = False
    passes: tuple[Pass, ...] = ()


@dataclass(frozen=True)
class Task:
    """A client's training: plan, data and options.

    Parameters
    ----------
    adapter
        Received adapter: the held components and the head.
    seed
        Of batch order and dropout.
    correction
        What is added to every gradient, see `hafl_app.training.drift_correction`.
    """

    adapter: Adapter
    plan: TrainPlan
    examples: Examples
    options: TrainOptions
    seed: int
    correction: Adapter | None = None

    @functools.cached_property
    def own_classes(self) -> OwnClasses | None:
        """The classes by which the loss adjusts logits; None: it does not."""
        tau = self.plan.logit_adjustment
        return None if tau is None else OwnClasses(self.examples.labels, tau)


@dataclass(frozen=True)
class Wanted:
    """Rows whose gradients a training waits for, in its own parameters, and of which penalty."""

    trainee: Trainee
    rows: NDArray[np.int64]
    tail: TailPruning | None


Steps = Generator[Wanted, float, TrainResult]
"""A training step by step: it yields a batch, and goes on with that batch's mean loss."""
Load = Callable[[Adapter, TrainPlan], Trainee]
Scores = dict[str, Tensor]
