"""A federated LoRA task that every way of simulating computes: data, clients, result.

Plain SGD on the factors alone, equal ranks, all clients in every round, averaged by examples.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hafl_app.config.compose import compose
from hafl_app.config.schema import Settings
from hafl_app.lowrank.factors import Adapter, LoraFactors, ModuleShape, initial_adapter
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.run import build
from hafl_app.seeds import client_seed
from hafl_app.training.batches import Batch, Examples, make_batch, training_batches
from hafl_app.training.classifier import LoraClassifier

State = dict[str, Tensor]
"""Factors by ``<module>/lora_A`` and ``<module>/lora_B``."""
_MODULES, _RANK, _STEP = 12, 8, 1e-3
_FIXED = (
    *("strategy=fedit", "ranks=homogeneous", "engine=inprocess", "tracking=none"),
    *(f"lora.max_rank={_RANK}", f"lora.lora_alpha={_RANK}", "model.head=frozen"),
    *("client.optimizer=sgd", "client.max_grad_norm=0", "client.precision=fp32"),
    "federation.fraction_evaluate=0",
)


@dataclass(frozen=True)
class SimulationTask:
    """Task to be computed.

    Parameters
    ----------
    num_clients, num_rounds
        At least 1.
    payload_bytes
        Clients do next to nothing with 24 arrays of so many bytes in all; 0: they train.
    overrides
        Settings of model, data and training, if they train.
    """

    num_clients: int
    num_rounds: int
    payload_bytes: int = 0
    overrides: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the task as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "SimulationTask":
        """Read what `to_json` wrote."""
        values = json.loads(text)
        return cls(**values | {"overrides": tuple(values["overrides"])})

    @property
    def all_overrides(self) -> list[str]:
        """Every setting of the run, as overrides."""
        sizes = (
            f"federation.num_clients={self.num_clients}",
            f"federation.num_rounds={self.num_rounds}",
        )
        return [*_FIXED, *sizes, *self.overrides]

    @property
    def settings(self) -> Settings:
        """The run's settings."""
        return compose(self.all_overrides)

    def build(self) -> "Workload":
        """Build the clients' model and data anew."""
        return NoOp(self) if self.payload_bytes else Training(self)


class Workload(Protocol):
    """Work of a task's clients."""

    initial: Adapter

    def num_examples(self, client: int) -> int:
        """Return a client's weight: no two have the same if they do nothing."""

    def train(self, state: State, server_round: int, client: int) -> State:
        """Return the global state after one client's work; the argument stays as it is."""


class NoOp:
    """Clients that add their number to everything, a thousandth each."""

    def __init__(self, task: SimulationTask) -> None:
        width = task.payload_bytes // (4 * _MODULES * _RANK)
        shape = ModuleShape(width - width // 2 + 9, width // 2 - 9)
        names = [f"encoder.layer.{layer}.attention.self.query" for layer in range(_MODULES)]
        # No zeros in lora_B: what is the same again and again is no fair payload.
        generator = torch.Generator().manual_seed(0)
        self.initial = initial_adapter(dict.fromkeys(names, shape), _RANK, seed=0).map(
            lambda f: LoraFactors(f.lora_A, torch.randn(f.lora_B.shape, generator=generator))
        )

    def num_examples(self, client: int) -> int:
        """Return 10, 13, 16 and so on."""
        return 10 + 3 * client

    def train(self, state: State, server_round: int, client: int) -> State:
        """Return the state with something added."""
        return {name: tensor + _STEP * (client + 1) for name, tensor in state.items()}


class Training:
    """Clients that train a resident model: parameters copied in, SGD, copies out."""

    def __init__(self, task: SimulationTask) -> None:
        self._settings = task.settings
        self._examples: dict[int, Examples] = {}
        self._text = build.federated_text(self._settings, task.num_clients)
        spec = build.classifier_spec(self._settings, len(self._text.label_names))
        self.model = LoraClassifier(spec)
        self.initial = initial_adapter(self.model.shapes(), _RANK, self._settings.seed)
        components = tuple(range(_RANK))
        plan = ModulePlan(components, components, 1.0)
        self.model.load(
            self.initial, TrainPlan(dict.fromkeys(self.initial.modules, plan), head="frozen")
        )
        self.parameters = {
            f"{name}/{factor}": parameter
            for name, pair in self.model.trainable_factors().items()
            for factor, parameter in zip(("lora_A", "lora_B"), pair, strict=True)
        }

    def num_examples(self, client: int) -> int:
        """Count a client's texts."""
        return self._text.share(client).num_examples

    def batches(self, server_round: int, client: int) -> Iterator[Batch]:
        """Yield a client's batches, with the seeds of batch order and dropout set."""
        seed = client_seed(self._settings.seed, server_round, client)
        torch.manual_seed(seed)
        if client not in self._examples:
            self._examples[client] = self._text.share(client).train()
        examples = self._examples[client]
        options = build.train_options(self._settings)
        for rows in training_batches(examples, options.batch_size, np.random.default_rng(seed)):
            yield make_batch(examples, rows, torch.device("cpu"))

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Return a batch's mean loss."""
        return torch.nn.functional.cross_entropy(self.model(input_ids, attention_mask), labels)

    def train(self, state: State, server_round: int, client: int) -> State:
        """Return the state after one pass over the client's texts."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])
        optimizer = torch.optim.SGD(
            self.parameters.values(), lr=self._settings.client.learning_rate
        )
        self.model.train()
        for batch in self.batches(server_round, client):
            optimizer.zero_grad()
            self.loss(batch.input_ids, batch.attention_mask, batch.labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


def to_state(adapter: Adapter) -> State:
    """Return an adapter's tensors by name."""
    return {
        f"{name}/{factor}": getattr(factors, factor)
        for name, factors in adapter.modules.items()
        for factor in ("lora_A", "lora_B")
    }


def to_adapter(state: State) -> Adapter:
    """Return the adapter of these tensors."""
    names = dict.fromkeys(name.rpartition("/")[0] for name in state)
    return Adapter({n: LoraFactors(state[f"{n}/lora_A"], state[f"{n}/lora_B"]) for n in names})
