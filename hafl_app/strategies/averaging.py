"""The fold of every method that averages factors component by component."""

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass

from hafl_app.lowrank.components import ComponentSums
from hafl_app.lowrank.factors import LoraFactors
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.strategies.exchange import ClientUpdate

Sums = Mapping[str, ComponentSums]


@dataclass(kw_only=True, eq=False)
class ComponentAveraging(HeterogeneousLora, ABC):
    """Weighted sums of the uploaded components, slot by slot; a method says what divides them."""

    def begin(self) -> Sums:
        """Return empty sums for every module."""
        return {n: ComponentSums.zeros(f) for n, f in self.global_adapter.modules.items()}

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
        """Divide each component by the weight of those who trained it."""
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
