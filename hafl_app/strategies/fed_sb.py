"""Fed-SB: a small square matrix between two frozen bases is trained, sent and averaged.

Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in
(Private) Federated LoRA Fine-Tuning", arXiv:2502.15436.
"""

from dataclasses import dataclass, replace

from hafl_app.plan import TrainPlan
from hafl_app.strategies.core_mean import OF_CORES, CoreMean
from hafl_app.wire.node_profile import NodeProfile


@dataclass(kw_only=True, eq=False)
class FedSb(CoreMean):
    """``Delta W = B R A`` with frozen B and A; ``R <- sum_k w_k R_k``, ``w_k ~ num_examples``.

    All clients share B and A, so the mean of products is the product with the mean of R: exact, for
    any number of clients. R alone, r x r, travels in both directions.

    Differs from the paper, of which the abstract and a copy of the authors' code were read: there B
    and A are the singular vectors of largest value of an estimate of the first full update, from
    gradients on some of the data, and R starts at those values. Here both are random, orthogonal,
    and drawn from the seed, so that no data are shared and no basis travels, and R starts at 0: a
    core reaches less at the same size. It weights all clients alike, for which there is
    ``federation.weighting=uniform``. A has the row norms of LoRA's start. Mixed ranks, which it
    does not have, are refused.
    """

    traits = replace(OF_CORES, serves_mixed_ranks=False)

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client trains one core, of its rank, in each module."""
        return self.train_plan(
            {
                name: self.core_module(range(rank), tuple(range(rank)), rank)
                for name, rank in self.budgets(profile).items()
            }
        )
