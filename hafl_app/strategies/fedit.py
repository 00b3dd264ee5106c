"""FedIT: average the factors of clients that all have one rank.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning",
arXiv:2305.05644.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.server.central_privacy import Division
from hafl_app.strategies.component_mean import ComponentAveraging, Sums
from hafl_app.strategies.hooks import StrategyError
from hafl_app.wire.node_profile import NodeProfile


@dataclass(kw_only=True, eq=False)
class FedIt(ComponentAveraging):
    """``lora_A <- sum_k w_k lora_A_k``, ``lora_B <- sum_k w_k lora_B_k``, ``w_k ~ num_examples``.

    The product of averages is not the average of products: the cross terms remain.
    """

    def check(self, ranks: Sequence[int]) -> None:
        """Refuse mixed ranks."""
        super().check(ranks)
        if len(set(ranks)) > 1:
            raise StrategyError(
                f"strategy=fedit needs one rank for all clients, got {sorted(set(ranks))}: "
                "use ranks=homogeneous, or a strategy for mixed ranks"
            )

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Everybody trains the same components: all of its rank."""
        return self.prefix_plan(self.budgets(profile))

    def private_division(self) -> Division:
        """Divide by the participants, in expectation."""
        return "contributors"

    def finish(self, state: Sums) -> Mapping[str, LoraFactors]:
        """Divide by the weight of the participants."""
        return self.over_contributors(state)
