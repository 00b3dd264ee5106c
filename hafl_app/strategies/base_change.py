"""What changes the base: components behind the first ``max_rank``, held by all, trained by none.

The global adapter of such a method has, in every module, its ``max_rank`` components that can be
trained, and behind them any number of frozen ones: their product is the change of the base weight,
kept as factors. A plan lists them among the held components, so that they travel, count in bytes,
stand in the forward pass, in checkpoints, scores and exports as any component does. Nodes keep
nothing from round to round: each request has the whole change.
"""

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from hafl_app.lowrank.factors import Adapter, LoraFactors, ModuleShape, initial_adapter
from hafl_app.lowrank.spectrum import Spectrum, sum_of
from hafl_app.lowrank.thin_svd import size_of
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.strategies.product_mean import OF_PRODUCTS, ProductMean
from hafl_app.wire.node_profile import NodeProfile

# Of a product kept in float32, singular values below this share of its size are rounding.
_ROUNDING = float(torch.finfo(torch.float32).eps)


@dataclass(kw_only=True, eq=False)
class BaseChange(HeterogeneousLora, ABC):
    """Template of a method that changes the base: plans, and the two parts of the adapter."""

    traits = replace(
        OF_PRODUCTS,
        homogeneous_form="exact mean",
        changes_base=True,
        not_robust="it averages products and merges them into the base",
    )

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client holds the whole adapter and trains its first components."""
        return self.base_plan(self.budgets(profile))

    def base_plan(self, ranks: Mapping[str, int], *, untrained: bool = True) -> TrainPlan:
        """Plan for a client that trains the first components and holds the change of the base.

        Parameters
        ----------
        ranks
            Module name to how many are trained.
        untrained
            Whether it also holds the components up to ``max_rank`` beyond its rank.
        """
        modules = {}
        for name, rank in ranks.items():
            trained, all_ranks = range(rank), range(self.global_adapter.modules[name].rank)
            held = all_ranks if untrained else (*trained, *all_ranks[self.max_rank :])
            modules[name] = ModulePlan(tuple(held), tuple(trained), self.scaling_of(rank))
        return self.train_plan(modules)

    def trainable(self, previous: Adapter) -> dict[str, LoraFactors]:
        """Return the components of each module that clients can train."""
        return {n: f.select(range(self.max_rank)) for n, f in previous.modules.items()}

    def base(self, previous: Adapter) -> dict[str, LoraFactors]:
        """Return the change of the base in each module, of rank 0 at the start."""
        return {n: f.select(range(self.max_rank, f.rank)) for n, f in previous.modules.items()}


@dataclass(kw_only=True, eq=False)
class FreshStart(BaseChange, ProductMean, ABC):
    """Template of a method that merges all it learned into the base and starts anew each round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.starts = 0

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client holds the change of the base, and trains new components beside it."""
        return self.base_plan(self.budgets(profile), untrained=False)

    def fresh(self, previous: Adapter) -> dict[str, LoraFactors]:
        """Return new components without effect: lora_B is 0, lora_A drawn anew each time."""
        self.starts += 1
        shapes = {name: ModuleShape.of(factors) for name, factors in previous.modules.items()}
        seed = self.options.seed + 1_000_003 * self.starts
        return dict(initial_adapter(shapes, self.max_rank, seed).modules)

    def memory(self) -> dict[str, Any]:
        """Return how often new components were drawn."""
        return {"starts": torch.tensor(self.starts)}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Restore that number."""
        self.starts = int(memory.get("starts", 0))


def extended(base: LoraFactors, addition: LoraFactors) -> LoraFactors:
    """Return the factors of ``base + addition``, of the least rank that holds it in float32.

    Exact to float32's rounding, never above rank ``min(out_features, in_features)``; without an
    addition ``base`` itself.
    """
    if not addition.rank:
        return base
    if not base.rank:
        return addition
    noise = rounding_of(base, addition)
    return Spectrum.of(sum_of([(base, 1.0), (addition, 1.0)]), noise=noise).factors(
        base.lora_A.dtype
    )


def rounding_of(*parts: LoraFactors) -> float:
    """Return the size up to which the difference of sums of these is float32's rounding."""
    return _ROUNDING * sum(float(size_of(part)) for part in parts)
