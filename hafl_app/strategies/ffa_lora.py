"""FFA-LoRA: lora_A stays as it was drawn, only lora_B is trained and averaged.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv:2403.12313.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.server.method import Traits
from hafl_app.strategies.component_mean import ComponentMean, Sums, over_contributors
from hafl_app.wire.node_profile import NodeProfile


@dataclass(kw_only=True, eq=False)
class FfaLora(ComponentMean):
    """All clients share one random lora_A that is never trained; the mean is of lora_B alone.

    ``b_i <- sum_{k in K_i} w_k b_{k,i} / sum_{k in K_i} w_k`` over the clients ``K_i`` that hold
    component i, ``w_k ~ num_examples``; ``a_i`` is the initial one for good. With one A for all
    the mean of products is the product of means, ``sum_k w_k B_k A = (sum_k w_k B_k) A``: the
    cross terms of FedIT are gone, and noise of differential privacy is not multiplied with noise.
    An upload has lora_B alone, half of a square layer's bytes.

    Differs from the paper: it has one rank for all. Here a client of rank r holds and trains the
    first r components, and a component is averaged over the clients that hold it. Zero padding
    would be the exact mean of products, but it shrinks ``b_i`` each round by the share of the
    clients that hold it; at equal ranks both are the paper's mean. ``b_{k,i}`` has the client's
    scaling folded in, so that the mean is of what clients add to the base also where
    ``lora.scaling`` makes scalings differ. lora_A travels down with every request, although it
    never changes.
    """

    traits = Traits(
        not_robust="", dp_division="contributors", coverage_exponent=0.0, sums_updates=True
    )

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client trains lora_B of the prefix that its rank allows."""
        return self.prefix_plan(self.budgets(profile), factors="B")

    def finish(self, state: Sums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Divide by the weight of those who hold a component."""
        return over_contributors(state, previous)
