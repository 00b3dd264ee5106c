"""The fold of every method that averages factors component by component."""

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass

from hafl_app.lowrank.components import ComponentSums
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.server.aggregation import empty_sums
from hafl_app.server.options import RunOptions
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.base import HeterogeneousLora

Sums = Mapping[str, ComponentSums]


@dataclass(kw_only=True, eq=False)
class ComponentMean(HeterogeneousLora, ABC):
    """Weighted sums of the uploaded components, slot by slot; a method chooses the divisor."""

    def begin(self, previous: Adapter) -> Sums:
        """Return the empty sums of every module."""
        return empty_components(previous, self.options)

    def accumulate(self, state: Sums, update: ClientUpdate) -> Sums:
        """Add the client's components to the slots that its plan names."""
        return add_components(state, update, self.weight(update))


def empty_components(adapter: Adapter, options: RunOptions) -> Sums:
    """Return empty sums of the components of every module of ``adapter``."""
    return {name: empty_sums(factors, options) for name, factors in adapter.modules.items()}


def add_components(state: Sums, update: ClientUpdate, weight: float) -> Sums:
    """Return the sums with a client's components, each in the slot that its plan names."""
    return {
        name: sums.add(update.adapter.modules[name], update.components(name), weight)
        for name, sums in state.items()
    }


def over_contributors(state: Sums, previous: Adapter) -> dict[str, LoraFactors]:
    """Average each component over those who trained it; one without contributors stays."""
    return {n: s.average_over_contributors(previous.modules[n]) for n, s in state.items()}


def over_all(state: Sums, previous: Adapter) -> dict[str, LoraFactors]:
    """Divide each component by the weight of all participants."""
    return {name: sums.average_over_all(previous.modules[name]) for name, sums in state.items()}


def of_changes(
    state: Sums, previous: Adapter, coverage_exponent: float = 1.0, step: float = 1.0
) -> dict[str, LoraFactors]:
    """Move each component by the mean change over all participants, 0 of those without it.

    With a ``coverage_exponent`` below 1 it moves closer to those who trained it, see
    `hafl_app.lowrank.components.ComponentSums.average_of_changes`.
    """
    return {
        name: sums.average_of_changes(previous.modules[name], coverage_exponent, step)
        for name, sums in state.items()
    }
