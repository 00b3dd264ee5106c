"""The fold of every method that averages factors component by component."""

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass

from hafl_app.lowrank.components import ComponentSums
from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.robust import RobustSums
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.base import HeterogeneousLora

Sums = Mapping[str, ComponentSums]


@dataclass(kw_only=True, eq=False)
class ComponentAveraging(HeterogeneousLora, ABC):
    """Weighted sums of the uploaded components, slot by slot; a method says what divides them.

    With ``federation.robust`` the mean over a component's contributors becomes their unweighted
    median or trimmed mean. Such a rule needs the whole round, so the state then keeps every
    upload until the end.
    """

    def begin(self) -> Sums:
        """Return the empty state for every module."""
        return {name: self._empty(factors) for name, factors in self.global_adapter.modules.items()}

    def _empty(self, factors: LoraFactors) -> ComponentSums:
        if self.options.robust == "none":
            return ComponentSums.zeros(factors)
        return RobustSums.empty(factors, self.options.robust, self.options.trim_fraction)

    def robust_reason(self) -> str:
        """Return nothing: a component's contributors can be compared with each other."""
        return ""

    def weight(self, update: ClientUpdate) -> float:
        """Return a client's weight: its number of examples."""
        return float(update.num_examples)

    def accumulate(self, state: Sums, update: ClientUpdate) -> Sums:
        """Add the client's components to the slots that its plan names."""
        weight = self.weight(update)
        return {
            name: sums.add(update.adapter.modules[name], update.components(name), weight)
            for name, sums in state.items()
        }

    def over_contributors(self, state: Sums) -> dict[str, LoraFactors]:
        """Average each component over those who trained it, by weight or by the robust rule."""
        return {
            name: sums.average_over_contributors(self.global_adapter.modules[name])
            for name, sums in state.items()
        }

    def over_all(self, state: Sums) -> dict[str, LoraFactors]:
        """Divide each component by the weight of everybody who took part."""
        return {
            name: sums.average_over_all(self.global_adapter.modules[name])
            for name, sums in state.items()
        }
