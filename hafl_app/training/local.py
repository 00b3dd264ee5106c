"""Local training: execute a plan on one client's data."""

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from hafl_app.lowrank.factors import Adapter
from hafl_app.plan import TrainPlan
from hafl_app.training.alignment import aligned
from hafl_app.training.batches import Examples, MicroBatches, is_out_of_memory
from hafl_app.training.choosing import reduced
from hafl_app.training.device import describe_device, peak_memory_mb, reset_peak_memory
from hafl_app.training.epochs import Allowance, optimize
from hafl_app.training.importance_meter import ImportanceMeter
from hafl_app.training.lora_model import LoraModel
from hafl_app.training.probe import probed_plan
from hafl_app.training.rank_pruning import prune_tail, tail_norms, tail_penalty
from hafl_app.training.settings import TrainOptions
from hafl_app.training.task import (
    DeviceMemoryError,
    Load,
    Steps,
    Task,
    TrainingError,
    TrainResult,
    Wanted,
)
from hafl_app.training.trainee import Trainee
from hafl_app.training.work import Work

_LOGGER = logging.getLogger(__name__)


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
    allowance = Allowance(task.plan.max_steps, task.options.max_seconds, started, clock)
    torch.manual_seed(task.seed)
    plan, probed = yield from probed_plan(task, load, allowance)
    probe_seconds = clock() - started if probed or plan.choice is not None else 0.0
    task = replace(task, plan=plan)
    torch.manual_seed(task.seed)  # the probe's dropout must not change the training's
    trainee = load(*reduced(task.adapter, plan))
    if plan.logit_adjustment is not None and not list(trainee.head_module.parameters()):
        raise TrainingError("logit_adjustment needs classes, and the model has no head")
    tail_before = tail_norms(trainee, plan.tail)
    meter = ImportanceMeter(plan.importance, plan.importance_smoothing)
    loss, steps = yield from optimize(task, trainee, meter, allowance, on_epoch)
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
