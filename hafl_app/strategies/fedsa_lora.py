"""FedSA-LoRA: lora_A is shared and averaged, every client keeps a lora_B of its own.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025,
arXiv:2410.01463.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.server.method import Traits
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.component_mean import ComponentMean, Sums, over_contributors
from hafl_app.wire.node_profile import NodeProfile


@dataclass(kw_only=True, eq=False)
class FedSaLora(ComponentMean):
    """Clients train both factors; ``A <- sum_k w_k A_k``, and ``B_k`` stays with client k.

    Personalized: client k's model is ``W0 + B_k A``, and there is none for all. The global
    adapter's lora_B stays 0, so that its central scores are those of the base model and the
    averaged head; what counts are the clients' scores on their own held-out data
    (``federation.fraction_evaluate``). lora_A alone travels, in both directions.

    A client's ``B_k`` is in its node's state, and is lost with it; it then starts again at 0.

    Differs from the paper: it has one rank for all. Here a client of rank r holds the first r
    components, and a row of lora_A is averaged over the clients that hold it. The paper's
    classifier stays on the clients on GLUE: ``model.head=local``.
    """

    # The lora_B of its products are the clients' own.
    traits = Traits(
        not_robust="", dp_division="contributors", coverage_exponent=None, sums_updates=True
    )

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client trains the prefix that its rank allows, and keeps its lora_B."""
        plan = self.prefix_plan(self.budgets(profile))
        modules = {n: replace(m, own_lora_B=True) for n, m in plan.modules.items()}
        return replace(plan, modules=modules)

    def accumulate(self, state: Sums, update: ClientUpdate) -> Sums:
        """Add the client's rows of lora_A; its lora_B has not come."""
        modules = {
            name: LoraFactors(
                factors.lora_A, factors.lora_A.new_zeros(len(state[name].lora_B), factors.rank)
            )
            for name, factors in update.adapter.modules.items()
        }
        shared = replace(update, adapter=Adapter(modules, update.adapter.head))
        return super().accumulate(state, shared)

    def finish(self, state: Sums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Divide by the weight of those who hold a row of lora_A; lora_B stays as it is."""
        averaged = over_contributors(state, previous)
        return {
            name: LoraFactors(factors.lora_A, previous.modules[name].lora_B)
            for name, factors in averaged.items()
        }
