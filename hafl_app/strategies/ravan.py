"""RAVAN: several heads of a trained core between frozen bases; a client trains some of them.

Raje et al., "Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning", NeurIPS 2025,
arXiv:2506.05568.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hafl_app.fields import number
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.seeds import client_seed
from hafl_app.server.method import StrategyError
from hafl_app.strategies.core_mean import CoreMean
from hafl_app.strategies.selection import ComponentSelection
from hafl_app.wire.node_profile import NodeProfile


@dataclass(kw_only=True, eq=False)
class Ravan(CoreMean):
    """``Delta W = sum_h s_h B_h H_h A_h`` with frozen bases; H_h and the scalar s_h are trained.

    Of the global adapter's ``max_rank`` components each head has ``max_rank / num_heads``. A client
    of rank r holds all heads and trains ``r // (max_rank / num_heads)`` of them, drawn at random
    anew in each round; the others stay frozen in its model. It uploads the products ``s_h H_h``,
    and ``H_h <- sum_{k in K_h} w_k s_{k,h} H_{k,h} / sum_{k in K_h} w_k`` over the clients that
    trained head h, ``w_k ~ num_examples``: bases are shared, so the mean of products is exact. Each
    s_h starts at 1 again.

    Reconstruction: the paper was read in its abstract, and the aggregation in another author's
    implementation. Which heads a client trains where it cannot train all is named there as a
    choice, not how it is made: here it is drawn. The bases are random and orthogonal, also across
    heads, and drawn from the seed; H starts at 0.

    Parameters
    ----------
    num_heads
        Heads in each module, at least 1; ``max_rank`` must be a multiple of it.
    """

    num_heads: int = number(4, at_least=1)

    def check(self, ranks: Sequence[int]) -> None:
        """Refuse ranks below the size of a head, and heads that are not of one size."""
        super().check(ranks)
        heads = f"strategy.num_heads={self.num_heads}"
        if self.max_rank % self.num_heads:
            raise StrategyError(
                f"{heads}: lora.max_rank={self.max_rank} is no multiple of it, and heads have one "
                "size"
            )
        if min(ranks, default=self.size) < self.size:
            raise StrategyError(
                f"a client has rank {min(ranks)}, below the {self.size} of a head: "
                f"lora.max_rank={self.max_rank} over {heads}"
            )

    @property
    def size(self) -> int:
        """Components of a head."""
        return self.max_rank // self.num_heads

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client holds all heads, and trains as many of them as its rank allows."""
        budgets = {name: rank // self.size for name, rank in self.budgets(profile).items()}
        seed = client_seed(self.options.seed, server_round, profile.partition_id)
        selection = ComponentSelection("random", "module", exploration=0.0)
        modules = self.global_adapter.modules.items()
        scores = {name: factors.lora_A.new_zeros(self.num_heads) for name, factors in modules}
        drawn = selection.select(budgets, scores, seed)
        return self.train_plan({name: self._module(heads) for name, heads in drawn.items()})

    def _module(self, heads: Sequence[int]) -> ModulePlan:
        trained = [i for h in heads for i in range(h * self.size, (h + 1) * self.size)]
        return self.core_module(range(self.max_rank), tuple(trained), self.size, scaled=True)
