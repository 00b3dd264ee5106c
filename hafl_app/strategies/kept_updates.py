"""The fold of methods that need all updates at once: they are kept until the round ends."""

from abc import ABC
from dataclasses import dataclass

from hafl_app.lowrank.factors import Adapter
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.base import HeterogeneousLora

Updates = tuple[ClientUpdate, ...]


@dataclass(kw_only=True, eq=False)
class KeptUpdates(HeterogeneousLora, ABC):
    """Template of a method whose `finish` sees every update, in partition order.

    Memory grows with the number of clients, also while streaming.
    """

    def begin(self, previous: Adapter) -> Updates:
        """Return no updates."""
        return ()

    def accumulate(self, state: Updates, update: ClientUpdate) -> Updates:
        """Keep the update until all are there."""
        return (*state, update)
