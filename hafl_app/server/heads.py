"""The classification heads of a round, folded into one."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hafl_app.lowrank.robust import robust_tensors


class HeadMean:
    """Running mean of heads by examples, in float64; holds one head, however many come.

    Parameters
    ----------
    shapes
        Of the tensors that travel, by name; without any, the head stays as it is.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._sums = {n: torch.zeros(shape, dtype=torch.float64) for n, shape in shapes.items()}
        self._total = 0

    def add(self, head: Mapping[str, Tensor], num_examples: int) -> None:
        """Add one client's head, with its number of examples, above 0."""
        for name, total in self._sums.items():
            total.add_(head[name].double(), alpha=num_examples)
        self._total += num_examples

    def mean(self, previous: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the mean, in the dtypes of ``previous``, which is returned if nothing came."""
        if not (self._sums and self._total):
            return previous
        return {n: (total / self._total).to(previous[n].dtype) for n, total in self._sums.items()}


class RobustHeads:
    """Robust mean of heads: each client counts once, and all heads are held until the end.

    Parameters
    ----------
    shapes
        As for `HeadMean`.
    rule, trim_fraction
        See `hafl_app.lowrank.robust.robust_mean`.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], rule: str, trim_fraction: float
    ) -> None:
        self._travels = bool(shapes)
        self._rule, self._trim_fraction = rule, trim_fraction
        self._heads: list[Mapping[str, Tensor]] = []

    def add(self, head: Mapping[str, Tensor], num_examples: int) -> None:
        """Add one client's head."""
        del num_examples
        self._heads.append(head)

    def mean(self, previous: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the robust mean, or ``previous`` if nothing came."""
        if not (self._travels and self._heads):
            return previous
        return robust_tensors(self._heads, self._rule, self._trim_fraction)
