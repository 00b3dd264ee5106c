"""Averages that a minority of wrong clients cannot move far: by component, over contributors.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
arXiv:1803.01498: the coordinate-wise median (definition 1) and trimmed mean (definition 2).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from hafl_app.lowrank.components import ComponentSums
from hafl_app.lowrank.factors import LoraFactors


def robust_mean(values: Tensor, rule: str, trim_fraction: float) -> Tensor:
    """Return the mean of what the rule leaves of each coordinate's values.

    With c values of a coordinate in order, ``median`` keeps the middle one, or the middle two if
    c is even. ``trimmed_mean`` drops ``floor(trim_fraction * c)`` at either end, and at least one
    once there are three. One value or two therefore give their mean under both rules: no rule can
    find out which of two is wrong.

    All clients count the same, by definition: a weight would let one that claims many examples
    outvote the rest. A bound on what wrong values do holds while they are fewer than half
    (``median``) or no more than are dropped at one end (``trimmed_mean``) of *this* coordinate's
    values, whatever they are.

    Parameters
    ----------
    values
        Shape ``(clients, ...)``, floating point; NaN where a client has no value.
    rule
        ``median`` or ``trimmed_mean``.
    trim_fraction
        Share dropped at either end by ``trimmed_mean``, in (0, 0.5).

    Returns
    -------
    Tensor
        Shape ``(...)``, dtype of ``values``; NaN where no client has a value.

    Raises
    ------
    ValueError
        If the rule is not known, or ``trim_fraction`` out of range.
    """
    count = values.isnan().logical_not().sum(0)  # (...)
    dropped = _dropped(count, rule, trim_fraction)
    ordered = values.sort(0).values  # NaN comes last
    place = torch.arange(len(values), device=values.device).view(-1, *[1] * count.ndim)
    kept = (place >= dropped) & (place < count - dropped)
    total = ordered.double().where(kept, 0.0).sum(0)
    return (total / kept.sum(0)).to(values.dtype)


def _dropped(count: Tensor, rule: str, trim_fraction: float) -> Tensor:
    """Return the number of values to drop at either end of each coordinate."""
    if rule == "median":
        return (count - 1).clamp(min=0) // 2
    if rule != "trimmed_mean":
        raise ValueError(f"rule must be median or trimmed_mean, got {rule!r}")
    if not 0 < trim_fraction < 0.5:
        raise ValueError(f"trim_fraction must be in (0, 0.5), got {trim_fraction}")
    # 0.29 * 100 is 28.999...96 in binary.
    share = (trim_fraction * count.double() + 1e-9).long()
    return share.clamp(min=1).where(count >= 3, 0)


def robust_factors(
    contributions: Sequence[tuple[LoraFactors, Sequence[int]]],
    previous: LoraFactors,
    rule: str,
    trim_fraction: float,
) -> LoraFactors:
    """Return a module whose components are robust means over those who trained them.

    Each coordinate of ``a_i`` and of ``b_i`` by itself, see `robust_mean`. This is of the
    factors, as in `ComponentSums.average_over_contributors`: it makes sense where all
    started component ``i`` from the same values.

    Parameters
    ----------
    contributions
        One a client: the components it trained, and which of the module's each of them is;
        distinct, in ``[0, rank)``.
    previous
        The module before the round. A component that no client trained keeps its values.
    rule, trim_fraction
        See `robust_mean`.

    Raises
    ------
    ValueError
        If the indices are not one valid, distinct slot for each component.
    """
    if not contributions:
        return previous
    lora_A = torch.stack([_placed(f.lora_A, s, previous.rank, 0) for f, s in contributions])
    lora_B = torch.stack([_placed(f.lora_B, s, previous.rank, 1) for f, s in contributions])
    merged_A = robust_mean(lora_A, rule, trim_fraction)  # (rank, in_features)
    merged_B = robust_mean(lora_B, rule, trim_fraction)  # (out_features, rank)
    return LoraFactors(
        previous.lora_A.where(merged_A.isnan(), merged_A),
        previous.lora_B.where(merged_B.isnan(), merged_B),
    )


def _placed(factor: Tensor, slots: Sequence[int], rank: int, dim: int) -> Tensor:
    """Return a factor with its components at their slots of the module, and NaN elsewhere."""
    valid = len(set(slots)) == len(slots) == factor.shape[dim] and set(slots) <= set(range(rank))
    if not valid:
        raise ValueError(
            f"{factor.shape[dim]} components need distinct indices in [0, {rank}), got {slots}"
        )
    shape = list(factor.shape)
    shape[dim] = rank
    index = torch.tensor(slots, dtype=torch.long, device=factor.device)
    return factor.new_full(shape, torch.nan).index_copy(dim, index, factor)


def robust_tensors(
    clients: Sequence[Mapping[str, Tensor]], rule: str, trim_fraction: float
) -> dict[str, Tensor]:
    """Return the robust mean of every named tensor, for heads: each client has all of them.

    Parameters
    ----------
    clients
        One mapping a client, at least one; the same names and shapes in each.
    rule, trim_fraction
        See `robust_mean`.
    """
    return {
        name: robust_mean(torch.stack([client[name] for client in clients]), rule, trim_fraction)
        for name in clients[0]
    }


@dataclass(frozen=True)
class RobustSums(ComponentSums):
    """The weights of `ComponentSums`, and what was added, because a robust rule needs all of it.

    Memory grows with the number of participants, where `ComponentSums` alone does not. Nothing
    is summed: lora_A and lora_B have the rank of the module and no features.

    Parameters
    ----------
    rule, trim_fraction
        See `robust_mean`.
    contributions
        Factors and indices of every participant so far.
    """

    rule: str = "median"
    trim_fraction: float = 0.2
    contributions: tuple[tuple[LoraFactors, Sequence[int]], ...] = ()

    @classmethod
    def empty(cls, like: LoraFactors, rule: str, trim_fraction: float) -> "RobustSums":
        """Return the state before any update, for a module with the sizes of ``like``."""
        sums = ComponentSums.zeros(_without_features(like))
        return cls(sums.lora_A, sums.lora_B, sums.weight, rule=rule, trim_fraction=trim_fraction)

    def add(self, factors: LoraFactors, indices: Sequence[int], weight: float) -> "RobustSums":
        """Return the sums with one participant added; its weight is no part of the rule."""
        sums = super().add(_without_features(factors), indices, weight)
        return replace(
            self,
            weight=sums.weight,
            total_weight=sums.total_weight,
            contributions=(*self.contributions, (factors, indices)),
        )

    def average_over_contributors(self, previous: LoraFactors) -> LoraFactors:
        """Return each component's robust mean over those who trained it."""
        return robust_factors(self.contributions, previous, self.rule, self.trim_fraction)

    def average_over_all(self, previous: LoraFactors) -> NoReturn:
        """Refuse: with zeros for the missing, a robust mean is 0 where half do not train.

        Raises
        ------
        ValueError
            Always.
        """
        raise ValueError(f"a {self.rule} over all participants is of the missing components' zeros")


def _without_features(factors: LoraFactors) -> LoraFactors:
    return LoraFactors(factors.lora_A[:, :0], factors.lora_B[:0])
