"""LoRA-A2: factors take turns, and each client chooses its components over the whole model.

Koo, Jang and Ok, "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous
Clients", ACL 2025, arXiv:2410.22815.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hafl_app.fields import choice, number
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.component_choice import MEASURES, SCOPES, ComponentChoice
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.server.method import Traits
from hafl_app.strategies.alternating import factor_of_round
from hafl_app.strategies.component_mean import ComponentMean, Sums, of_changes
from hafl_app.wire.node_profile import NodeProfile


@dataclass(kw_only=True, eq=False)
class LoraA2(ComponentMean):
    """Odd rounds train lora_B, even ones lora_A; a client trains what a probe moves most.

    1. *Adaptive selection*: client k holds the global rank ``r_G`` and trains it for one pass. Of
       the ``r_G N`` components of all N modules it chooses the ``r_k N`` with the largest
       contribution, ``||b'_i - b_i|| ||a_i||`` in rounds of lora_B and ``||b_i|| ||a'_i - a_i||``
       in those of lora_A, starts again and trains the chosen vectors alone.
    2. *Alternating freeze*: the other factor is common to all, so the mean of products is exact,
       ``B <- B + sum_k w_k delta B_k`` over all participants, 0 where client k did not choose.
    3. Its learning rate of lora_B is five times that of lora_A: ``conf/strategy/lora_a2.yaml``
       sets ``client.lora_B_lr_ratio``, which another value overrides.

    An upload has at most ``r_k`` vectors of one factor per module on average, and their indices.
    Because the choice is over the whole model and modules differ in size, its bytes are known
    beforehand as an upper bound. The probe costs one more pass in every round. Under
    ``privacy=secure_aggregation`` it has all ``r_G N`` vectors of the factor under masks, 0 where a
    client did not choose: its choice stays with it, and the result is the same.

    Differs from the paper: a node keeps nothing, so both factors travel down where the paper sends
    the one that has changed. Whether training goes on from the probe or starts again could not be
    read; it starts again. The paper's head is frozen, here it is what ``model.head`` says.

    Parameters
    ----------
    measure
        ``contribution``; or, as the paper's ablation, ``sensitivity``, or its variants
        ``smoothed`` and ``adalora``, of gradients.
    scope
        ``model``, or ``module``: ``r_k`` components in each module.
    probe_steps
        Batches of the probe; 0: one pass over the client's data, as in the paper.
    """

    traits = Traits(
        not_robust="it counts a component that a client did not choose as unchanged, which a "
        "median takes for the majority",
        dp_refusal="privacy=central_dp does not cover components that clients choose by their "
        "data: use strategy=ffa_lora",
        uploads_importance=True,
        trains_global_rank=True,  # in its probe
        sums_updates=True,
    )

    measure: str = choice("contribution", *MEASURES)
    scope: str = choice("model", *SCOPES)
    probe_steps: int = number(0, at_least=0)

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client holds all, and may choose its budget's worth of one factor's vectors."""
        everything = tuple(range(self.max_rank))
        factors, scaling = factor_of_round(server_round), self.scaling_of(self.max_rank)
        modules = {
            name: ModulePlan(everything, everything, scaling, factors=factors, budget=budget)
            for name, budget in self.budgets(profile).items()
        }
        rule = ComponentChoice(self.measure, self.scope, self.probe_steps)
        return self.train_plan(modules, choice=rule)

    def finish(self, state: Sums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Add the mean change over all participants."""
        return of_changes(state, previous)
