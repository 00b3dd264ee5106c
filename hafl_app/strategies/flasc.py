"""FLASC: dense local training, and only the largest numbers travel.

Kuo, Raje, Rajesh and Smith, "Federated LoRA with Sparse Communication", arXiv:2406.05233.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hafl_app.fields import number
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.sparse import largest_entries
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.server.method import Traits
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.component_mean import ComponentMean, Sums, of_changes
from hafl_app.wire.node_profile import NodeProfile


@dataclass(frozen=True)
class _Round:
    """A round's sums, and the factors that its changes are added to."""

    previous: Adapter
    sums: Sums


@dataclass(kw_only=True, eq=False)
class Flasc(ComponentMean):
    """A client of rank r is sent, and uploads, the share ``d = r / max_rank`` of all numbers.

    1. *Sparse download*: of the numbers of all factors the d largest by magnitude, others are 0.
    2. *Dense training*: the client holds the global rank and trains all of it.
    3. *Sparse upload*: of the change since the download the d largest numbers, chosen anew.
    4. ``P <- P + eta sum_k w_k change_k`` over all participants, with ``P`` the global factors.

    A mask is one bit a number beside the float32 numbers that are kept, so bytes are known
    beforehand: ``4 d N + N / 8`` of N numbers. A client of the global rank has no mask.

    Differs from the paper: its server gives the mean change to Adam, here it is added. Weights are
    ``num_examples``, where the code's are equal. Masks are over the factors alone: the head is
    dense both ways, where the authors' upload mask covers it. The density of a client follows from
    its rank, by layer type from the mean of its ranks; ranks of 1, 4 and 16 are the paper's
    densities of 1/16, 1/4 and 1.

    Parameters
    ----------
    server_step
        ``eta``, above 0.
    """

    traits = Traits(
        not_robust="a number that a client does not upload counts as unchanged, which a median "
        "takes for the majority",
        dp_refusal="privacy=central_dp has zero padding in expectation, and no sparse changes: use "
        "strategy=zero_padding",
        uploads_sparsely=True,
        trains_global_rank=True,
        sum_refusal="where its uploads have numbers is not masked, and without it they are as "
        "large as all factors: use strategy=zero_padding",
    )

    server_step: float = number(1.0, above=0)

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client trains everything, and its share of the numbers travels."""
        everything, scaling = tuple(range(self.max_rank)), self.scaling_of(self.max_rank)
        budgets = self.budgets(profile)
        density = sum(budgets.values()) / (self.max_rank * len(budgets))
        modules = {name: ModulePlan(everything, everything, scaling) for name in budgets}
        upload = "sparse" if density < 1 else "fp32"
        return self.train_plan(modules, density=density, upload=upload)

    def dispatch(self, plan: TrainPlan) -> Adapter:
        """Send the plan's share of the largest numbers."""
        whole = super().dispatch(plan)
        if plan.density == 1:
            return whole
        scaling = {name: module.scaling for name, module in plan.modules.items()}
        kept = plan.kept_numbers(plan.held_numbers(self.layer_shapes()))
        modules = largest_entries(whole.modules, kept, scaling)
        return Adapter({name: modules[name] for name in whole.modules}, whole.head)

    def begin(self, previous: Adapter) -> _Round:  # type: ignore[override]
        """Return empty sums beside what the round starts from."""
        return _Round(previous, super().begin(previous))

    def accumulate(self, state: _Round, update: ClientUpdate) -> _Round:  # type: ignore[override]
        """Add the client's change since its download to the factors that the server has."""
        modules = {}
        for name, after in update.adapter.modules.items():
            before, whole = update.before.modules[name], state.previous.modules[name]
            step = self.server_step
            modules[name] = LoraFactors(
                whole.lora_A.double() + step * (after.lora_A.double() - before.lora_A.double()),
                whole.lora_B.double() + step * (after.lora_B.double() - before.lora_B.double()),
            )
        weight = self.weight(update)
        sums = {
            name: sums.add(modules[name], update.components(name), weight)
            for name, sums in state.sums.items()
        }
        return _Round(state.previous, sums)

    def finish(self, state: _Round, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Add the mean change over all participants."""
        return of_changes(state.sums, previous)
