"""Selection of components within budgets: in every module, or over the whole model."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hafl_app.lowrank.importance import select_components, select_over_model


def select_within(
    budgets: Mapping[str, int],
    scores: Mapping[str, Tensor],
    scope: str,
    exploration: float,
    seed: int,
) -> dict[str, tuple[int, ...]]:
    """Return the best components by module, ascending.

    Parameters
    ----------
    budgets
        Most components of each module, or with ``scope=model`` what they sum to.
    scores
        Module name to a finite score for each component; equal ones are drawn at random.
    scope
        ``module``: the budget holds in every module. ``model``: the sum of all modules' budgets
        is spent on the best components of the whole model.
    exploration
        Share of the components drawn at random, in [0, 1].
    seed
        Of all that is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    if scope == "model":
        total = sum(budgets.values())
        return select_over_model(scores, total, explore=exploration, generator=generator)
    return {
        name: select_components(scores[name], budget, explore=exploration, generator=generator)
        for name, budget in budgets.items()
    }
