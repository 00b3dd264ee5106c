"""Zero padding: cut to a prefix, pad the uploads with zeros, average.

The baseline of every paper on mixed ranks; described as such in Cho et al., "Heterogeneous LoRA
for Federated Fine-tuning of On-Device Foundation Models", arXiv:2401.06432.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.server.method import Traits
from hafl_app.strategies.component_mean import ComponentMean, Sums, over_all
from hafl_app.wire.node_profile import NodeProfile


@dataclass(kw_only=True, eq=False)
class ZeroPadding(ComponentMean):
    """A client of rank r holds the first r components; a missing component counts as zero.

    Each factor of component i shrinks by its coverage ``f_i = sum_{r_k >= i} w_k`` a round, the
    product by ``f_i^2``: high components are diluted. Where that is 0, ``b_i`` becomes 0 and
    ``a_i`` stays, so that the component can still learn.

    Where scalings differ (``lora.scaling=per_rank`` or ``rslora``) the padded lora_B is
    ``s_k B_k``. The papers write ``Delta W_k = B_k A_k`` without a scaling, and FLoRA's code
    (arXiv:2409.05976) pads clients of one scaling, ``lora_alpha = 2 r_k``: there both readings
    are the same. Of two scalings only the folded factors are of one kind: ``s_k B_k A_k`` is what
    client k adds to the base, the global adapter has one function, and a client starts from its
    slice of that. A mean of raw B would have no scaling of its own, and reach a client of rank 2
    as a function four times as strong as one of rank 8.
    """

    traits = Traits(
        sums_updates=True,
        not_robust="it counts missing components as zeros, which a median takes for the majority",
        dp_division="participants",
        coverage_exponent=2.0,
    )

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client holds and trains the prefix that its rank allows."""
        return self.prefix_plan(self.budgets(profile))

    def finish(self, state: Sums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Divide by the weight of all participants, whether they hold a component or not."""
        return over_all(state, previous)
