"""Averages of single components: over those who trained one, or over all participants."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hafl_app.lowrank.factors import LoraFactors


@dataclass(frozen=True)
class ComponentSums:
    """Running weighted sums of one module's components, for a fold over the participants.

    ``lora_A[i] = sum_k w_k a_{k,i}``, ``lora_B[:, i] = sum_k w_k b_{k,i}`` and
    ``weight[i] = sum_k w_k`` over the participants ``k`` that trained component ``i``.

    Parameters
    ----------
    lora_A
        Shape ``(rank, in_features)``, float64.
    lora_B
        Shape ``(out_features, rank)``, float64.
    weight
        Shape ``(rank,)``, float64, at least 0.
    total_weight
        Weight of all participants, also of those without a component in this module.
    """

    lora_A: Float[Tensor, "rank in_features"]
    lora_B: Float[Tensor, "out_features rank"]
    weight: Float[Tensor, " rank"]
    total_weight: float = 0.0

    @classmethod
    def zeros(cls, like: LoraFactors) -> "ComponentSums":
        """Return the empty sums for a module with the sizes and device of ``like``."""
        return cls(
            torch.zeros_like(like.lora_A, dtype=torch.float64),
            torch.zeros_like(like.lora_B, dtype=torch.float64),
            like.lora_A.new_zeros(like.rank, dtype=torch.float64),
        )

    def add(self, factors: LoraFactors, indices: Sequence[int], weight: float) -> "ComponentSums":
        """Return the sums with one participant's components added, to these very tensors.

        One copy of the sums is enough for a fold: go on with what is returned. Call it for every
        participant: one without a component in this module adds rank-0 factors and no ``indices``,
        and still counts in ``total_weight``.

        Parameters
        ----------
        factors
            The components that the participant trained.
        indices
            Which component of the module each of them is; distinct, in ``[0, rank)``.
        weight
            For example the number of examples; finite, at least 0.

        Raises
        ------
        ValueError
            If ``indices`` are not one valid, distinct slot for each component, or ``weight`` is
            negative or not finite.
        """
        rank = len(self.weight)
        if not (isfinite(weight) and weight >= 0):
            raise ValueError(f"weight must be finite and not negative, got {weight}")
        if _is_prefix(tuple(indices), factors.rank, rank):  # by far the usual case
            prefix, all_of_them = len(indices), len(indices) == rank
            lora_A = self.lora_A if all_of_them else self.lora_A[:prefix]
            lora_B = self.lora_B if all_of_them else self.lora_B[:, :prefix]
            lora_A.add_(factors.lora_A, alpha=weight)
            lora_B.add_(factors.lora_B, alpha=weight)
            self.weight[:prefix].add_(weight)
        else:
            slots = torch.tensor(indices, dtype=torch.long, device=self.weight.device)
            self.lora_A.index_add_(0, slots, factors.lora_A.double(), alpha=weight)
            self.lora_B.index_add_(1, slots, factors.lora_B.double(), alpha=weight)
            self.weight.index_add_(0, slots, torch.full_like(slots, weight, dtype=torch.float64))
        return ComponentSums(self.lora_A, self.lora_B, self.weight, self.total_weight + weight)

    def average_over_contributors(self, previous: LoraFactors) -> LoraFactors:
        """Return each component's average over those who trained it.

        ``a_i = sum_{k in K_i} w_k a_{k,i} / sum_{k in K_i} w_k`` and likewise ``b_i``, with
        ``K_i`` the participants that trained component ``i``. Averages of factors: the cross
        terms ``b_{k,i} a_{j,i}`` remain unless one participant alone trained the component, whose
        values then survive bit for bit.

        Parameters
        ----------
        previous
            The module before the round. A component with weight 0 keeps its values bit for bit.

        Notes
        -----
        Adaptive aggregation of Su et al., "Federated LLMs Fine-tuned with Adaptive
        Importance-Aware LoRA" (HAFL), arXiv:2411.06581, reconstructed: only the abstract was
        available to us. With prefixes as indices, the averaging of RBLA, arXiv:2408.08699.
        """
        return self._divide(previous, self.weight, uncovered="keep")

    def average_over_all(self, previous: LoraFactors) -> LoraFactors:
        """Return each component's average over all participants, with zeros for the missing.

        ``a_i = sum_{k in K_i} w_k a_{k,i} / sum_k w_k`` and likewise ``b_i``: each factor shrinks
        by the coverage ``f_i = weight[i] / total_weight``, their product by ``f_i^2``.

        Parameters
        ----------
        previous
            The module before the round, returned as it is if there was no participant.

        Notes
        -----
        Zero padding as in Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device
        Foundation Models" (HetLoRA), arXiv:2401.06432. Differs from the paper: where no one
        trained a component only ``b_i`` becomes 0 and ``a_i`` stays. The product is the same,
        0, but with both at 0 the component could never learn again.
        """
        if self.total_weight == 0:
            return previous
        total = torch.full_like(self.weight, self.total_weight)
        return self._divide(previous, total, uncovered="clear")

    def average_of_changes(
        self, previous: LoraFactors, coverage_exponent: float = 1.0, step: float = 1.0
    ) -> LoraFactors:
        """Return each component moved by the sum of its changes over a damped divisor.

        ``a_i + step * sum_{k in K_i} w_k (a_{k,i} - a_i) / (W_i^(1 - e) W^e)`` and likewise
        ``b_i``, with ``K_i`` the participants that trained component ``i``, ``W_i`` their weight,
        ``W`` that of all, and ``e = coverage_exponent``. At 1 it is the mean change over all
        participants, one that did not train a component counting as unchanged: a component that
        few trained moves little, and nothing shrinks. At 0 it is `average_over_contributors`, bit
        for bit where ``step`` is 1.

        Parameters
        ----------
        previous
            The module before the round, returned as it is if there was no participant. A component
            that no one trained keeps its values bit for bit.
        coverage_exponent
            ``e``, in [0, 1].
        step
            At least 0.
        """
        if self.total_weight == 0:
            return previous
        covered = self.weight > 0
        weight = self.weight.where(covered, 1.0)
        # The same, written as a share of the way to the average over those who trained it.
        way = step * (weight / self.total_weight) ** coverage_exponent
        lora_A = torch.lerp(previous.lora_A.double(), self.lora_A / weight[:, None], way[:, None])
        lora_B = torch.lerp(previous.lora_B.double(), self.lora_B / weight, way[None])
        return LoraFactors(
            lora_A.to(previous.lora_A.dtype).where(covered[:, None], previous.lora_A),
            lora_B.to(previous.lora_B.dtype).where(covered, previous.lora_B),
        )

    def _divide(
        self,
        previous: LoraFactors,
        divisor: Float[Tensor, " rank"],
        *,
        uncovered: Literal["keep", "clear"],
    ) -> LoraFactors:
        """Return the sums over ``divisor``; uncovered components keep or clear ``lora_B``."""
        covered = self.weight > 0
        divisor = divisor.where(covered, 1.0)
        lora_A = (self.lora_A / divisor[:, None]).to(previous.lora_A.dtype)
        lora_B = (self.lora_B / divisor).to(previous.lora_B.dtype)
        rest = previous.lora_B if uncovered == "keep" else torch.zeros_like(previous.lora_B)
        return LoraFactors(
            lora_A.where(covered[:, None], previous.lora_A), lora_B.where(covered, rest)
        )


@lru_cache(maxsize=1024)
def _is_prefix(indices: tuple[int, ...], count: int, rank: int) -> bool:
    """Whether these are the first slots; refuse all but ``count`` distinct slots of ``rank``."""
    if len(indices) != count or len(set(indices)) != count:
        raise ValueError(f"{count} components need distinct indices, got {indices}")
    if any(not 0 <= i < rank for i in indices):
        raise ValueError(f"indices {indices} must be in [0, {rank})")
    return indices == tuple(range(count))
