"""Select a client's components within its budget: by score, at random, or the first ones."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hafl_app.lowrank.importance import select_components, select_over_model


@dataclass(frozen=True)
class ComponentSelection:
    """A rule of selection.

    Parameters
    ----------
    by
        ``importance``; or, as controls, ``random`` (anew each round) or ``prefix``.
    scope
        ``module``: the budget holds in every module. ``model``: the sum of all modules' budgets
        is spent on the best components of the whole model.
    exploration
        Share of the components drawn at random, in [0, 1].
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
        budgets
            Most components of each module, or with ``scope=model`` what they sum to.
        scores
            Module name to a finite score for each component; equal ones are drawn at random.
        seed
            Of all that is drawn.
        """
        if self.by == "prefix":
            return {name: tuple(range(budget)) for name, budget in budgets.items()}
        generator = torch.Generator().manual_seed(seed)
        if self.scope == "model":
            return select_over_model(
                scores, sum(budgets.values()), explore=self.exploration, generator=generator
            )
        return {
            name: select_components(
                scores[name], budget, explore=self.exploration, generator=generator
            )
            for name, budget in budgets.items()
        }
