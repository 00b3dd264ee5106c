"""Fixtures of the tests of local training: the built-in random model and hand-made examples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.training.classifier import ClassifierSpec, LoraClassifier
from hafl_app.training.settings import BaseSpec

LABELS = 3
TINY = BaseSpec("", random_weights=True)  # layers 32 and 48 wide
SPEC = ClassifierSpec(TINY, num_labels=LABELS, seed=7)
CPU = torch.device("cpu")
QUERY = "encoder.layer.0.attention.self.query"  # (32, 32)
WIDE = "encoder.layer.1.intermediate.dense"  # (48, 32)


@dataclass(frozen=True)
class Rows:
    """Labeled token sequences stored end to end."""

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]

    def row(self, index: int) -> NDArray[np.int32]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def rows_of(sequences: Sequence[Sequence[int]], labels: Sequence[int]) -> Rows:
    offsets = np.cumsum([0, *map(len, sequences)]).astype(np.int64)
    tokens = np.array([t for s in sequences for t in s], dtype=np.int32)
    return Rows(tokens, offsets, np.array(labels, dtype=np.int64))


def random_rows(number: int, seed: int = 0, longest: int = 9) -> Rows:
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(1, 512, rng.integers(1, longest + 1)).tolist() for _ in range(number)]
    return rows_of(sequences, rng.integers(0, LABELS, number).tolist())


def random_adapter(
    classifier: LoraClassifier,
    ranks: int | Callable[[str], int],
    seed: int = 0,
    *,
    head: bool = True,
) -> Adapter:
    """Return factors large enough to matter, lora_B not 0, and a head that is not the initial."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, shape in classifier.shapes().items():
        rank = ranks if isinstance(ranks, int) else ranks(name)
        modules[name] = LoraFactors(
            0.5 * torch.randn(rank, shape.in_features, generator=generator),
            0.5 * torch.randn(shape.out_features, rank, generator=generator),
        )
    state = {
        k: torch.randn(v.shape, generator=generator) for k, v in classifier.initial_head.items()
    }
    return Adapter(modules, state if head else {})


def plan_for(adapter: Adapter, trainable: Sequence[int] | None = None, **settings) -> TrainPlan:
    """Return a plan that holds everything in ``adapter``, and trains ``trainable`` of it."""
    scaling = settings.pop("scaling", 1.0)
    modules = {}
    for name, factors in adapter.modules.items():
        held = tuple(range(factors.rank))
        chosen = held if trainable is None else tuple(i for i in trainable if i < factors.rank)
        modules[name] = ModulePlan(held, chosen, scaling)
    return TrainPlan(modules, **settings)


def parameters_of(
    classifier: LoraClassifier, adapter_name: str
) -> dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """Return PEFT's own ``(lora_A, lora_B)`` of every adapted layer."""
    return {
        name: (layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight)
        for name, layer in classifier.layers.items()
    }


def assert_same_adapter(left: Adapter, right: Adapter) -> None:
    assert differing(left, right) == []


def differing(left: Adapter, right: Adapter) -> list[str]:
    """Return the names of the modules and head tensors that are not equal bit for bit."""
    assert set(left.modules) == set(right.modules)
    assert set(left.head) == set(right.head)
    modules = [
        name
        for name, factors in left.modules.items()
        if not torch.equal(factors.lora_A, right.modules[name].lora_A)
        or not torch.equal(factors.lora_B, right.modules[name].lora_B)
    ]
    return modules + [k for k, v in left.head.items() if not torch.equal(v, right.head[k])]


def with_module(adapter: Adapter, name: str, factors: LoraFactors) -> Adapter:
    modules: Mapping[str, LoraFactors] = {**adapter.modules, name: factors}
    return Adapter(modules, adapter.head)
