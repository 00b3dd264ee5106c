"""Select a client's components within its budget: by score, at random, or the first ones."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hafl_app.lowrank.selection import select_within


@dataclass(frozen=True)
class ComponentSelection:
    """A rule of selection.

    Parameters
    ----------
    by
        ``importance``; or, as controls, ``random`` (anew each round) or ``prefix``.
    scope, exploration
        See `hafl_app.lowrank.selection.select_within`.
    """

    by: str
    scope: str
    exploration: float

    def select(
        self, budgets: Mapping[str, int], scores: Mapping[str, Tensor], seed: int
    ) -> dict[str, tuple[int, ...]]:
        """Return the components that a client trains, by module, ascending.

        Parameters
        ----------
        budgets, scores, seed
            See `hafl_app.lowrank.selection.select_within`.
        """
        if self.by == "prefix":
            return {name: tuple(range(budget)) for name, budget in budgets.items()}
        return select_within(budgets, scores, self.scope, self.exploration, seed)
