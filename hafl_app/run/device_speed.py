"""Speed of this machine: FLOP/s of a matrix product, and of training steps as a run takes them."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hafl_app.config.schema import Settings
from hafl_app.lowrank.factors import initial_adapter
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.run import build
from hafl_app.training.device import (
    describe_device,
    resolve_device,
    resolve_precision,
    threads,
    usable_memory_mb,
)
from hafl_app.training.importance_meter import ImportanceMeter
from hafl_app.training.optimizer import build_optimizer
from hafl_app.training.step_memory import training_step

_SIDE = 1024  # of the matrices: large enough for a processor's peak, small enough for a phone
_SECONDS = 3.0
_FEWEST = 3
_CLASSES = 2


@dataclass(frozen=True)
class DeviceSpeed:
    """What a machine does, as a class of simulated devices needs it.

    Parameters
    ----------
    device, precision
        Where and in what was computed.
    gemm_flops
        Most FLOP/s of a matrix product.
    step_flops
        FLOP/s of training steps: median.
    steps
        How many were taken.
    memory_mb
        MB of 10^6 bytes that training may take now.
    """

    device: str
    precision: str
    gemm_flops: float
    step_flops: float
    steps: int
    memory_mb: float


def measure_speed(
    settings: Settings,
    seconds: float = _SECONDS,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> DeviceSpeed:
    """Measure this machine with the run's model, batches, rank and threads.

    Parameters
    ----------
    seconds
        Of each of the two measurements, at least.
    clock
        In whose seconds; `time.process_time` leaves out what else the processor does.

    Raises
    ------
    hafl_app.training.locate.ModelError
        If the base model is not there.
    """
    device = resolve_device(settings.client.device)
    precision = resolve_precision(settings.client.precision, device)
    with threads(settings.client.num_threads):
        products = _times(_product(device, precision), device, seconds, clock)
        step, flops = _step(settings)
        steps = _times(step, device, seconds, clock)
    return DeviceSpeed(
        describe_device(device),
        precision,
        gemm_flops=2 * _SIDE**3 / products[0],
        step_flops=flops / steps[len(steps) // 2],
        steps=len(steps),
        memory_mb=usable_memory_mb(device),
    )


def _product(device: torch.device, precision: str) -> Callable[[], object]:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.rand(_SIDE, _SIDE, device=device).to(dtype) for _ in "lr")
    return lambda: left @ right


def _step(settings: Settings) -> tuple[Callable[[], object], float]:
    """Return a training step at the largest rank, and its FLOPs."""
    model, options = build.model(settings, _CLASSES), build.train_options(settings)
    held = tuple(range(settings.lora.max_rank))
    plan = TrainPlan(dict.fromkeys(model.layers, ModulePlan(held, held)))
    model.load(initial_adapter(model.shapes(), len(held), settings.seed), plan)
    model.train()
    optimizer, meter = build_optimizer(model, plan, options), ImportanceMeter("none", 0.0)
    longest = getattr(model.base.config, "max_position_embeddings", settings.dataset.max_length)
    shape = options.texts_at_once, min(settings.dataset.max_length, longest)
    row = build.row_flops(settings, _CLASSES).training(plan, shape[1])
    return lambda: training_step(model, options, shape, optimizer, meter), shape[0] * row


def _times(
    call: Callable[[], object],
    device: torch.device,
    seconds: float,
    clock: Callable[[], float],
) -> list[float]:
    """Return the times of repeated calls in ascending order, without those of the first."""
    times: list[float] = []
    call()
    while sum(times) < seconds or len(times) < _FEWEST:
        started = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - started)
    return sorted(times)
