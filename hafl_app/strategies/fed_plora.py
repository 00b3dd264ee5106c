"""Fed-PLoRA: a client trains components drawn at random, the others stay frozen in its model.

Zhang, Hu and Xu, "Heterogeneous Federated Fine-Tuning with Parallel One-Rank Adaptation",
ICLR 2026, arXiv:2602.16936.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.seeds import client_seed
from hafl_app.server.method import Traits
from hafl_app.strategies.component_mean import ComponentMean, Sums, over_contributors
from hafl_app.strategies.selection import ComponentSelection
from hafl_app.wire.node_profile import NodeProfile


@dataclass(kw_only=True, eq=False)
class FedPLora(ComponentMean):
    """The adapter is ``max_rank`` parallel modules of rank 1, of which a client trains r.

    In each module of the model, client k draws ``K_k``, ``|K_k| = r_k``, and holds the others
    folded into its base: ``W_k = W_0 + sum_{i not in K_k} b_i a_i``. So every client starts from
    the whole global model, whatever its rank. Afterwards
    ``b_i <- sum_{i in K_k} w_k b_{k,i} / sum_{i in K_k} w_k``, ``w_k ~ num_examples``, and a_i
    likewise; a component that no client drew keeps its value. It is `Hafl` with
    ``scheme=freezing`` and ``selection=random``, without a score; `FedIt` where every client has
    rank ``max_rank``.

    Reconstruction: the paper was read in its abstract and in accounts of it. The server draws, from
    seed, round and client, with the same distribution. Frozen components stand beside the base
    as factors; added to the weight itself they would give the same sums, and take a copy of it.
    """

    traits = Traits(
        not_robust="", dp_division="contributors", coverage_exponent=0.0, sums_updates=True
    )

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client holds all components, and trains as many of them as its rank allows."""
        everything, scaling = tuple(range(self.max_rank)), self.scaling_of(self.max_rank)
        selection = ComponentSelection("random", "module", exploration=0.0)
        seed = client_seed(self.options.seed, server_round, profile.partition_id)
        scores = {n: f.lora_A.new_zeros(f.rank) for n, f in self.global_adapter.modules.items()}
        drawn = selection.select(self.budgets(profile), scores, seed)
        return self.train_plan(
            {name: ModulePlan(everything, chosen, scaling) for name, chosen in drawn.items()}
        )

    def finish(self, state: Sums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Divide by the weight of those who drew a component."""
        return over_contributors(state, previous)
