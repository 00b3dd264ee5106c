"""One client's accepted update, as a method's fold takes it."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hafl_app.lowrank.change import change_size
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan


@dataclass(frozen=True)
class ClientUpdate:
    """One client's accepted update, as a method's fold takes it.

    Parameters
    ----------
    partition_id
        Partition of the client; updates are folded in this order.
    num_examples
        Its weight, above 0.
    plan, sent
        Plan of the client as it was executed, so after its choice of components if it had one, and
        the adapter that it received.
    adapter
        Its trained components: the first ``rank`` of ``plan.modules[name].trainable``. A factor
        that the plan does not train is what was sent.
    importance
        Module name to component scores, if the plan asked for them.
    steps
        Optimizer steps that it took, as it states them; 0 if it does not.
    own_weights
        Module name to the weight that clients gave themselves in a secure sum: the mean over those
        with the same components, see `hafl_app.plan_parts.own_weight`. Empty: the method weighs.
    """

    partition_id: int
    num_examples: int
    plan: TrainPlan
    sent: Adapter
    adapter: Adapter
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    own_weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def before(self) -> Adapter:
        """The uploaded components and the head as they were when they were sent."""
        modules = {name: self.before_of(name) for name in self.adapter.modules}
        return Adapter(modules, {name: self.sent.head[name] for name in self.adapter.head})

    def before_of(self, module: str) -> LoraFactors:
        """Return the uploaded components of one module as they were when they were sent."""
        rank = self.adapter.modules[module].rank
        return _selected(
            self.sent.modules[module], self.plan.modules[module].trainable_slots[:rank]
        )

    @functools.cached_property
    def size(self) -> float:
        """Size of the client's change, see `change_size`: finite if and only if all numbers are.

        Found when the reply is judged: its numbers are then looked through once.
        """
        scaling = {name: module.scaling for name, module in self.plan.modules.items()}
        trained = self.plan.uploaded_factors
        return change_size(self.adapter.only(trained), self.before.only(trained), scaling)

    def components(self, module: str) -> tuple[int, ...]:
        """Global indices of the components that this update holds for a module."""
        return self.plan.modules[module].trainable[: self.adapter.modules[module].rank]


def _selected(factors: LoraFactors, slots: Sequence[int]) -> LoraFactors:
    """Return some components; the same factors, uncopied, where these are all of them."""
    return factors if list(slots) == list(range(factors.rank)) else factors.select(slots)
