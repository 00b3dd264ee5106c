"""RBLA: average each component over the clients that hold it.

Chen et al., "RBLA: Rank-Based-LoRA-Aggregation for Fine-tuning Heterogeneous Models in FLaaS",
arXiv:2408.08699.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.server.method import Traits
from hafl_app.strategies.component_mean import ComponentMean, Sums, over_contributors
from hafl_app.wire.node_profile import NodeProfile


@dataclass(kw_only=True, eq=False)
class Rbla(ComponentMean):
    """A client of rank r holds the first r components; a missing one counts for nothing.

    ``b_i <- sum_{r_k >= i} w_k b_{k,i} / sum_{r_k >= i} w_k`` and a_i likewise,
    ``w_k ~ num_examples``; what no participant holds keeps its value. Nothing is diluted, and the
    clients of the largest rank alone decide the last components. It is HAFL's adaptive aggregation
    over prefixes, and `FedIt` at equal ranks.

    Reconstruction: the paper was read in its abstract, the rule in re-implementations. Where
    scalings differ, lora_B has each client's own folded in, see `ZeroPadding`.
    """

    traits = Traits(
        not_robust="", dp_division="contributors", coverage_exponent=0.0, sums_updates=True
    )

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client holds and trains the prefix that its rank allows."""
        return self.prefix_plan(self.budgets(profile))

    def finish(self, state: Sums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Divide by the weight of those who hold a component."""
        return over_contributors(state, previous)
