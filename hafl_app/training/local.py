"""Local training: execute a plan on one client's data."""

import functools
import gc
import logging
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hafl_app.component_choice import ComponentChoice
from hafl_app.lowrank.factors import Adapter
from hafl_app.plan import ImportanceMeasure, TailPruning, TrainPlan
from hafl_app.training.alignment import aligned
from hafl_app.training.batches import (
    Examples,
    MicroBatches,
    is_out_of_memory,
    training_batches,
)
from hafl_app.training.choosing import chosen_plan, contributions, probe_plan, reduced
from hafl_app.training.device import describe_device, peak_memory_mb, reset_peak_memory
from hafl_app.training.drift_correction import DriftCorrection
from hafl_app.training.importance_meter import ImportanceMeter
from hafl_app.training.lora_model import LoraModel, Trainee
from hafl_app.training.own_classes import OwnClasses
from hafl_app.training.proximal import ProximalTerm
from hafl_app.training.rank_pruning import prune_tail, tail_norms, tail_penalty
from hafl_app.training.settings import TrainOptions
from hafl_app.training.work import Pass, Work

_LOGGER = logging.getLogger(__name__)


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


class _Allowance:
    """Limits of a training: the plan's steps, and the client's time."""

    def __init__(
        self, max_steps: int, max_seconds: float, started: float, clock: Callable[[], float]
    ) -> None:
        self._clock = clock
        self._max_steps = max_steps
        self._max_seconds = max_seconds
        self._started = started
        self.out_of_time = False

    def of_probe(self, max_steps: int) -> "_Allowance":
        """Return a probe's limits: steps of its own, and the time that there is for everything."""
        return _Allowance(max_steps, self._max_seconds, self._started, self._clock)

    def is_spent(self, steps: int) -> bool:
        """Whether no further step may be taken; to be asked only when there is one to take."""
        if self._max_steps and steps >= self._max_steps:
            return True
        # Without a single step the reply would bring nothing.
        if steps and self._max_seconds:
            self.out_of_time = self._clock() - self._started >= self._max_seconds
        return self.out_of_time


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


def train(
    model: LoraModel,
    adapter: Adapter,
    plan: TrainPlan,
    examples: Examples,
    options: TrainOptions,
    seed: int,
    on_epoch: Callable[[int, float], None] | None = None,
    correction: Adapter | None = None,
) -> TrainResult:
    """Train the plan's components, and the head unless it is frozen.

    A batch for which memory does not suffice is done again in halves whose gradients add up to
    its own, and so are those that follow. Every text is read and weighted as before; only dropout,
    the base model's own included, draws other masks for a batch in parts.

    Parameters
    ----------
    adapter
        Received adapter: the held components and the head.
    seed
        Of batch order and dropout.
    on_epoch
        Called after each epoch with its number, from 1, and its mean loss. It may score the
        model as it stands, but not load other factors into it.
    correction
        See `Task`.

    Raises
    ------
    LossNotFiniteError
        If the loss is not finite.
    DeviceMemoryError
        If memory does not suffice for one text at a time.
    TrainingError
        If the plan trains nothing.
    """
    device = model.device
    reset_peak_memory(device)
    model.checkpoint_gradients(options.gradient_checkpointing)
    task = Task(adapter, plan, examples, options, seed, correction)
    micro_batches = MicroBatches(options.texts_at_once)

    def load(adapter: Adapter, plan: TrainPlan) -> LoraModel:
        model.load(adapter, plan)
        return model

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        steps = training_steps(task, load, time.perf_counter, on_epoch)
        result = _take(steps, lambda wanted: _backward(model, task, micro_batches, wanted))
    return replace(result, micro_batch_size=micro_batches.size)


def _take(steps: Steps, backward: Callable[[Wanted], float]) -> TrainResult:
    """Take all steps of a training; return its result."""
    try:
        wanted = next(steps)
        while True:
            wanted = steps.send(backward(wanted))
    except StopIteration as done:
        result: TrainResult = done.value
        return result


def training_steps(
    task: Task,
    load: Load,
    clock: Callable[[], float],
    on_epoch: Callable[[int, float], None] | None = None,
) -> Steps:
    """Train one client, whoever computes its gradients.

    All but the gradients is here: order of the batches, importance, clipping, optimizer, limits.

    Parameters
    ----------
    load
        Puts an adapter into the model and returns where it lies.
    clock
        Seconds that this client has taken.
    on_epoch
        See `train`.
    """
    work = Work(task.examples, task.options.texts_at_once)

    def noting(adapter: Adapter, plan: TrainPlan) -> Trainee:
        work.begin(plan)
        return load(adapter, plan)

    result = yield from _counted(_training_steps(task, noting, clock, on_epoch), work)
    return replace(result, passes=work.passes)


def _counted(steps: Steps, work: Work) -> Steps:
    """Pass a training's batches on, and count their rows."""
    try:
        wanted = next(steps)
        while True:
            work.add(wanted.rows)
            wanted = steps.send((yield wanted))
    except StopIteration as done:
        result: TrainResult = done.value
        return result


def _training_steps(
    task: Task,
    load: Load,
    clock: Callable[[], float],
    on_epoch: Callable[[int, float], None] | None,
) -> Steps:
    started = clock()
    allowance = _Allowance(task.plan.max_steps, task.options.max_seconds, started, clock)
    torch.manual_seed(task.seed)
    plan, probed = yield from _probe(task, load, allowance)
    probe_seconds = clock() - started if probed or plan.choice is not None else 0.0
    task = replace(task, plan=plan)
    torch.manual_seed(task.seed)  # the probe's dropout must not change the training's
    trainee = load(*reduced(task.adapter, plan))
    if plan.logit_adjustment is not None and not list(trainee.head_module.parameters()):
        raise TrainingError("logit_adjustment needs classes, and the model has no head")
    tail_before = tail_norms(trainee, plan.tail)
    meter = ImportanceMeter(plan.importance, plan.importance_smoothing)
    loss, steps = yield from _optimize(task, trainee, meter, allowance, on_epoch)
    trained = trainee.trained(plan)
    if plan.tail is not None and plan.tail.prune:
        tail_after = tail_norms(trainee, plan.tail)
        trained = prune_tail(trained, plan.tail, tail_before, tail_after)
    if plan.align is not None:
        trained = aligned(trained, task.adapter, plan.align)
    return TrainResult(
        plan=plan,
        adapter=trained,
        num_examples=len(task.examples.labels),
        loss=loss,
        steps=steps,
        seconds=clock() - started,
        probe_seconds=probe_seconds,
        peak_memory_mb=peak_memory_mb(trainee.device),
        importance=probed or meter.scores(),
        micro_batch_size=task.options.texts_at_once,
        out_of_time=allowance.out_of_time,
    )


def _optimize(
    task: Task,
    trainee: Trainee,
    meter: ImportanceMeter,
    allowance: _Allowance,
    on_epoch: Callable[[int, float], None] | None,
) -> Generator[Wanted, float, tuple[float, int]]:
    """Train; return the mean loss of the last epoch with a step in it, and the steps."""
    plan, options = task.plan, task.options
    optimizer, rng = build_optimizer(trainee, plan, options), np.random.default_rng(task.seed)
    proximal = ProximalTerm(_parameters(optimizer), plan.proximal)
    correction = DriftCorrection(trainee, task.correction)
    steps, losses = 0, [0.0]
    for epoch in range(plan.local_epochs):
        if allowance.is_spent(steps):
            break  # before the losses of the last epoch with a step are gone
        trainee.train()
        losses = []
        for rows in training_batches(task.examples, options.batch_size, rng):
            if allowance.is_spent(steps):
                break
            losses.append((yield Wanted(trainee, rows, plan.tail)))
            meter.update(trainee)  # what the data say, not what keeps near
            proximal.add_gradient()
            correction.add_gradient()
            _update(optimizer, options.max_grad_norm)
            steps += 1
            if not np.isfinite(losses[-1]):
                raise LossNotFiniteError(
                    f"the loss is {losses[-1]} in step {steps}, epoch {epoch + 1}"
                )
        if on_epoch is not None:
            on_epoch(epoch + 1, float(np.mean(losses or [0.0])))
    return float(np.mean(losses or [0.0])), steps


def _update(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    """Make an optimizer step with the gradients clipped."""
    if max_grad_norm:
        nn.utils.clip_grad_norm_(_parameters(optimizer), max_grad_norm)
    optimizer.step()


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _backward(model: LoraModel, task: Task, micro_batches: MicroBatches, wanted: Wanted) -> float:
    """Leave a batch's gradients in the model, in smaller parts if need be; return its mean loss."""
    while True:
        try:
            return _backward_in_parts(model, task, micro_batches, wanted)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        # Only here, where the traceback no longer holds what the failed part had computed.
        release(model)
        if not micro_batches.halve(len(wanted.rows)):
            raise DeviceMemoryError(_too_large(model, task))
        _LOGGER.warning("%s: going on with %d texts at once", reason, micro_batches.size)


def _backward_in_parts(
    model: LoraModel, task: Task, micro_batches: MicroBatches, wanted: Wanted
) -> float:
    """Add up the gradients of a batch's parts, and of the tail penalty once."""
    mean_loss, rows, tail = 0.0, wanted.rows, wanted.tail
    targets = model.num_targets(task.examples, rows)
    model.clear_gradients()
    for index, part in enumerate(micro_batches.split(rows)):
        batch = model.batch(task.examples, part)
        with model.computing(task.options.precision):
            mean = model.loss(batch, task.own_classes)
        # Its share of the batch's mean: the mean of the parts' means would favor small parts.
        loss = mean * (model.num_targets(task.examples, part) / targets)
        total = loss if tail is None or index else loss + tail_penalty(wanted.trainee, tail)
        total.backward()  # type: ignore[no-untyped-call]
        mean_loss += loss.item()
    return mean_loss


def release(model: LoraModel) -> None:
    """Release the memory of a batch that failed in a model."""
    model.clear_gradients()
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def _too_large(model: LoraModel, task: Task) -> str:
    modules = task.plan.modules.values()
    held = max((len(module.held) for module in modules), default=0)
    trained = max((len(module.trainable) for module in modules), default=0)
    return (
        f"{describe_device(model.device)}: out of memory with 1 text at a time of a "
        f"batch of {task.options.batch_size}, at rank {held}, of which {trained} is trained"
    )


def build_optimizer(
    model: Trainee, plan: TrainPlan, options: TrainOptions
) -> torch.optim.Optimizer:
    """Return the optimizer over the plan's trainable tensors, and nothing frozen."""
    pairs = list(model.trainable_factors().values())
    head = list(model.head_module.parameters()) if plan.trains_head else []
    groups = [
        {"params": [a for a, _ in pairs if a.requires_grad] + head, "lr": options.learning_rate},
        {
            "params": [b for _, b in pairs if b.requires_grad] + model.trainable_scales(),
            "lr": options.learning_rate * options.lora_B_lr_ratio,
        },
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise TrainingError("the plan trains nothing: no components and a frozen head")
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, weight_decay=options.weight_decay)
    # Four times as fast as the loop over all tensors that is torch's default on the CPU.
    return torch.optim.AdamW(groups, weight_decay=options.weight_decay, fused=True)


def _probe(
    task: Task, load: Load, allowance: _Allowance
) -> Generator[Wanted, float, tuple[TrainPlan, Scores]]:
    """Return the plan after the client's choice, and the importance of what it holds.

    Both are measured on a few batches before training, where the plan asks for them.
    """
    plan = task.plan
    if plan.choice is not None:
        scores = yield from _choice_scores(task, load, allowance, plan.choice)
        return chosen_plan(plan, scores, task.seed), {}
    if not plan.probe_batches or plan.importance == "none":
        return plan, {}
    probe = replace(task, plan=plan.training_everything())
    meter = ImportanceMeter(plan.importance, plan.importance_smoothing)
    return plan, (yield from _gradient_scores(probe, load, meter, plan.probe_batches))


def _choice_scores(
    task: Task, load: Load, allowance: _Allowance, rule: ComponentChoice
) -> Generator[Wanted, float, Scores]:
    """Score what the client may choose from: by a probe that trains it, or by its gradients."""
    plan = probe_plan(task.plan)
    probe = replace(task, plan=plan)
    if rule.measure != "contribution":
        meter = ImportanceMeter(cast(ImportanceMeasure, rule.measure), rule.smoothing)
        return (yield from _gradient_scores(probe, load, meter, plan.max_steps or None))
    trainee, no_meter = load(task.adapter, plan), ImportanceMeter("none", 0.0)
    yield from _optimize(probe, trainee, no_meter, allowance.of_probe(plan.max_steps), None)
    return contributions(task.adapter, trainee.trained(plan), plan)


def _gradient_scores(
    task: Task, load: Load, meter: ImportanceMeter, most_batches: int | None
) -> Generator[Wanted, float, Scores]:
    """Measure what the task's plan trains on a few batches of a pass, without a step."""
    trainee = load(task.adapter, task.plan)
    trainee.train()
    rng = np.random.default_rng(task.seed)
    batches = training_batches(task.examples, task.options.batch_size, rng)
    for rows in islice(batches, most_batches):
        yield Wanted(trainee, rows, tail=None)
        meter.update(trainee)
    return meter.scores()
