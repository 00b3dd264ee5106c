"""Cohorts: the trainings of several clients in one model, step by step together.

The base model is frozen and the same for all, so its products are computed once for the rows of
many clients (`hafl_app.training.cohort_lora`). Everything else of a training is each client's own
and the same code as alone: batches, loss, clipping, importance, optimizer, limits. A client with
fewer steps leaves; one that fails is left to be trained alone.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hafl_app.lowrank.factors import Adapter
from hafl_app.plan import TrainPlan
from hafl_app.training.batches import is_out_of_memory, joined
from hafl_app.training.causal import IGNORED
from hafl_app.training.cohort_lora import ClientAdapter, Cohort
from hafl_app.training.device import reset_peak_memory
from hafl_app.training.fused_lora import FusedLoraLinear
from hafl_app.training.local import release, training_steps
from hafl_app.training.lora_model import LoraModel, mean_loss
from hafl_app.training.rank_pruning import tail_penalty
from hafl_app.training.settings import TrainOptions
from hafl_app.training.task import Steps, Task, TrainResult, Wanted

_LOGGER = logging.getLogger(__name__)
# Tokens at once, padding included: more does not fit a CPU's caches, and fills a GPU.
_TOKENS_AT_ONCE = {"cpu": 512, "cuda": 8192}
_MASKS = "the masks would be others than alone"
_MOST_PADDING = 1.25  # tokens with padding over those that the clients have alone


def obstacle(options: TrainOptions) -> str | None:
    """Return why a client with these options trains alone, by name of the setting, or None."""
    if options.max_seconds:
        return f"client.max_seconds={options.max_seconds:g}: a time limit is each client's own"
    if options.texts_at_once < options.batch_size:
        return f"client.micro_batch_size={options.micro_batch_size}: memory is short"
    if options.tokens_per_step:
        return f"client.tokens_per_step={options.tokens_per_step}: a step goes through in parts"
    return None


def obstacle_of(model: LoraModel) -> str | None:
    """Return why clients with this model train alone, by name of the setting, or None."""
    for name, layer in model.layers.items():
        if not isinstance(layer, FusedLoraLinear):
            return f"lora.target_modules: {name} is no linear layer"
        if not all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values()):
            return f"lora.lora_dropout: {_MASKS}"
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
            return f"model.dropout: {name} drops, {_MASKS}"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"batch norm of the base model in {name}: it mixes the rows of clients"
    rates = _dropout_rates(model.base.config)
    return f"model.dropout: {next(iter(rates))}, {_MASKS}" if rates else None


def _dropout_rates(config: Any) -> dict[str, float]:
    """Return the rates above 0 of a Transformers configuration: some layers drop by function."""
    return {
        name: float(value)
        for name, value in vars(config).items()
        if "drop" in name and isinstance(value, int | float) and value
    }


def train_cohort(model: LoraModel, tasks: Sequence[Task]) -> list[TrainResult | None]:
    """Train several clients together.

    Parameters
    ----------
    tasks
        None of them with an `obstacle`, and the model without an `obstacle_of`.

    Returns
    -------
    list of TrainResult or None
        In the order of the tasks. ``seconds`` are a client's share, so that they add up to the
        time of the cohort; the peak of memory is the cohort's. None for one to be trained alone,
        because its training failed or because memory does not suffice.
    """
    device = model.device
    reset_peak_memory(device)
    model.checkpoint_gradients(tasks[0].options.gradient_checkpointing)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return _Together(model, tasks).run()


class _Clock:
    """Seconds that a client has taken of a cohort's time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@dataclass(frozen=True)
class _Client:
    """A client in training: its steps, and the clock that they read."""

    task: Task
    steps: Steps
    clock: _Clock


class _Together:
    """Steps of several trainings, whose gradients are computed together.

    Parameters
    ----------
    model, tasks
        See `train_cohort`.
    """

    def __init__(self, model: LoraModel, tasks: Sequence[Task]) -> None:
        self._model = model
        self._cohort = Cohort(model)
        self._tokens = _TOKENS_AT_ONCE[model.device.type]
        self._clients = [self._client(task) for task in tasks]
        self._waiting: dict[int, Wanted] = {}
        self._results: list[TrainResult | None] = [None] * len(tasks)

    def run(self) -> list[TrainResult | None]:
        """Take the steps of all clients; return their results."""
        for number in range(len(self._clients)):
            self._go_on(number, None)
        while self._waiting:
            for chunk in self._chunks():
                self._step(chunk)
        return self._results

    def _client(self, task: Task) -> _Client:
        clock = _Clock()

        def load(adapter: Adapter, plan: TrainPlan) -> ClientAdapter:
            self._model.load(adapter, plan)
            return ClientAdapter(self._model, plan)

        return _Client(task, training_steps(task, load, clock), clock)

    def _go_on(self, number: int, loss: float | None) -> None:
        """Continue a client's training until it waits for gradients again, or ends."""
        client, started = self._clients[number], time.perf_counter()
        self._waiting.pop(number, None)
        try:
            # A generator that has not begun takes None alone.
            self._waiting[number] = client.steps.send(loss)  # type: ignore[arg-type]
        except StopIteration as done:
            self._results[number] = done.value
        except Exception as error:  # the same happens alone, and is reported there
            _LOGGER.info("a client leaves its cohort: %s: %s", type(error).__name__, error)
        client.clock.seconds += time.perf_counter() - started

    def _step(self, chunk: Sequence[int]) -> None:
        """Compute the gradients of some clients' batches; continue their trainings."""
        started, losses = time.perf_counter(), self._losses(chunk)
        if losses is None:
            release(self._model)
            if len(chunk) == 1:
                _LOGGER.info("a client leaves its cohort: memory does not suffice")
                del self._waiting[chunk[0]]
            self._tokens = self._tokens // 2
            return
        share = (time.perf_counter() - started) / len(chunk)
        for number, loss in zip(chunk, losses, strict=True):
            self._clients[number].clock.seconds += share
            self._go_on(number, loss)

    def _losses(self, chunk: Sequence[int]) -> list[float] | None:
        """Leave the gradients of these clients' batches; return the losses, None out of memory."""
        try:
            return self._backward(chunk)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _backward(self, chunk: Sequence[int]) -> list[float]:
        model, options = self._model, self._clients[chunk[0]].task.options
        tasks = [self._clients[number].task for number in chunk]
        wanted = [self._waiting[number] for number in chunk]
        adapters = [w.trainee for w in wanted if isinstance(w.trainee, ClientAdapter)]
        rows = [model.batch(t.examples, w.rows) for t, w in zip(tasks, wanted, strict=True)]
        for adapter in adapters:
            adapter.clear_gradients()
        with self._cohort.reading(adapters):
            with model.computing(options.precision):
                logits, targets = model.predictions(joined(rows, IGNORED))
                classes = [task.own_classes for task in tasks]
                parts = (logits.chunk(len(chunk)), targets.chunk(len(chunk)), classes)
                losses = torch.stack([mean_loss(*part) for part in zip(*parts, strict=True)])
            penalties = [tail_penalty(w.trainee, w.tail) for w in wanted if w.tail is not None]
            sum(penalties, losses.sum()).backward()  # type: ignore[no-untyped-call]
        means: list[float] = losses.tolist()
        return means

    def _chunks(self) -> Iterator[list[int]]:
        """Yield the waiting clients in groups that go through the model at once.

        Those of a group have as many rows each, and rows of about the same length.
        """
        sizes = {number: self._size(number) for number in self._waiting}
        chunk: list[int] = []
        tokens = 0
        for number in sorted(sizes, key=lambda n: (sizes[n], n)):
            rows, length = sizes[number]
            padded = (len(chunk) + 1) * rows * length
            same_rows = chunk and sizes[chunk[0]][0] == rows
            tokens += rows * length
            fits = padded <= self._tokens and padded <= _MOST_PADDING * tokens
            if chunk and not (same_rows and fits):
                yield chunk
                chunk, tokens = [], rows * length
            chunk.append(number)
        if chunk:
            yield chunk

    def _size(self, number: int) -> tuple[int, int]:
        """Return how many rows a client's batch has, and the tokens of the longest."""
        rows = self._waiting[number].rows
        return len(rows), self._model.row_length(self._clients[number].task.examples, rows)
