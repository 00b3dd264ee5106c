"""RoLoRA: the factors take turns, each is averaged while the other one is common to all.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA",
NeurIPS 2025, arXiv:2502.01755.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.server.method import Traits
from hafl_app.strategies.alternating import factor_of_round
from hafl_app.strategies.component_mean import ComponentMean, Sums, over_contributors
from hafl_app.wire.node_profile import NodeProfile


@dataclass(kw_only=True, eq=False)
class RoLora(ComponentMean):
    """Odd rounds train and average lora_B, even rounds lora_A.

    ``B <- sum_k w_k B_k`` with A fixed, then ``A <- sum_k w_k A_k`` with B fixed,
    ``w_k ~ num_examples``. As in FFA-LoRA the mean of products is the product of means in every
    round, and here both factors learn. An upload has one factor, half of a square layer's bytes.

    Reconstruction: the paper was read in its abstract. Which factor begins is our choice, lora_B,
    since lora_A has no gradient while lora_B is 0. The paper has one rank for all. Here a client of
    rank r holds and trains the first r components, and a component is averaged over the clients
    that hold it; at equal ranks that is the paper's mean. Both factors travel down, since a node
    keeps nothing, where the paper sends the one that has changed.
    """

    traits = Traits(
        not_robust="", dp_division="contributors", coverage_exponent=0.0, sums_updates=True
    )

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client trains one factor of the prefix that its rank allows."""
        return self.prefix_plan(self.budgets(profile), factors=factor_of_round(server_round))

    def finish(self, state: Sums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Divide by the weight of those who hold a component."""
        return over_contributors(state, previous)
