"""Bits for components by importance under a budget, as HAFLQ allocates them.

Su, Yan and Deng, arXiv:2411.06581v2, section V. The section could not be read: what is known is
that bits follow importance and bandwidth. The order of the steps is a reconstruction.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Upgrade = Literal["level", "component"]


def allocate_bits(
    importance: Float[Tensor, " count"],
    costs: Int[Tensor, "count levels"],
    budget: int,
    upgrade: Upgrade = "level",
) -> Int[Tensor, " count"]:
    """Allocate a level of precision to each component; level 0 leaves it out.

    One list of steps, of which the longest affordable beginning is taken: first every component
    gets the lowest level, the most important one first; then they are raised, again from the most
    important one. So more budget or more importance never means fewer bits, what is left over is
    less than the next step, and nothing is raised before everything is in.

    Parameters
    ----------
    importance
        Finite. Among equals those that come first count as more important.
    costs
        Cost of a component at each level, not falling along a row, above 0.
    budget
        In the costs' unit, at least 0.
    upgrade
        ``level``: all components are raised by one level before any is raised by two.
        ``component``: the most important one is raised to the top before the next one is at all.

    Raises
    ------
    ValueError
        If an importance is not finite.
    """
    if not importance.isfinite().all():
        raise ValueError(f"importance must be finite, got {importance.tolist()}")
    count = len(costs)
    order = importance.argsort(descending=True, stable=True)
    steps = torch.diff(costs, prepend=costs.new_zeros(count, 1))[order]
    raises = steps[:, 1:].T if upgrade == "level" else steps[:, 1:]
    spent = torch.cat([steps[:, 0], raises.flatten()]).cumsum(0)
    taken = spent <= budget
    raised = taken[count:].reshape(raises.shape).sum(0 if upgrade == "level" else 1)
    allocated = torch.zeros(count, dtype=torch.long)
    allocated[order] = taken[:count].long() + raised
    return allocated
