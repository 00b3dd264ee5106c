"""FedIT: average the factors of clients that all have one rank.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning",
arXiv:2305.05644.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.server.method import Traits
from hafl_app.strategies.component_mean import ComponentMean, Sums, over_contributors
from hafl_app.wire.node_profile import NodeProfile


@dataclass(kw_only=True, eq=False)
class FedIt(ComponentMean):
    """``lora_A <- sum_k w_k lora_A_k``, ``lora_B <- sum_k w_k lora_B_k``, ``w_k ~ num_examples``.

    The product of averages is not the average of products: the cross terms remain. All ranks are
    one, and so are the scalings that lora_B has folded in: a mean of raw factors is the same.
    """

    traits = Traits(
        serves_mixed_ranks=False, not_robust="", dp_division="contributors", sums_updates=True
    )

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client trains the same components: all of its rank."""
        return self.prefix_plan(self.budgets(profile))

    def finish(self, state: Sums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Divide by the weight of the participants."""
        return over_contributors(state, previous)
