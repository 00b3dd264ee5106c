"""FSLoRA: every client trains a random sketch of the global adapter.

Fang et al., "Federated Sketching LoRA: A Flexible Framework for Heterogeneous Collaborative
Fine-Tuning of LLMs", arXiv:2501.19389.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.seeds import client_seed
from hafl_app.server.method import Traits
from hafl_app.strategies.component_mean import ComponentMean, Sums, of_changes
from hafl_app.strategies.selection import ComponentSelection
from hafl_app.wire.node_profile import NodeProfile


@dataclass(kw_only=True, eq=False)
class FsLora(ComponentMean):
    """A client's forward pass is ``W0 + s B S_k A`` with a random diagonal sketch ``S_k``.

    ``S_k`` has ``r / k`` at k of the r components, drawn anew in every module and round, and 0 at
    the others, so that its expectation is the identity: k is the client's rank. It trains these k
    components with the sketch in the forward pass, so their gradients carry ``r / k`` too. The
    server adds the mean change over all participants,
    ``B <- B + sum_k w_k (B_k - B)``, ``A <- A + sum_k w_k (A_k - A)``, 0 where ``S_k`` is 0.

    Components outside of the sketch do not act, and do not travel.

    Differs from the paper: ``w_k ~ num_examples``, where it has equal weights. Its code gives the
    mean change to an AdamW of the server, and applies no sketch, since it looks for parameters by
    a name that none has; the equation is followed here. Every module draws for itself, and the
    draw is the server's.
    """

    traits = Traits(
        sums_updates=True,
        not_robust="it counts a component outside of a client's sketch as unchanged, which a "
        "median takes for the majority",
        dp_refusal="privacy=central_dp has zero padding in expectation, and no mean of changes "
        "over all participants: use strategy=zero_padding",
    )

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Draw the client's sketch: what it holds, trains and amplifies."""
        seed = client_seed(self.options.seed, server_round, profile.partition_id)
        ties = {name: torch.zeros(self.max_rank) for name in self.global_adapter.modules}
        drawn = ComponentSelection("random", "module", 0.0).select(
            self.budgets(profile), ties, seed
        )
        scaling = self.scaling_of(self.max_rank)
        return self.train_plan(
            {
                name: ModulePlan(sketch, sketch, scaling, gain=self.max_rank / len(sketch))
                for name, sketch in drawn.items()
            }
        )

    def finish(self, state: Sums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Add the mean change over all participants."""
        return of_changes(state, previous)
