"""Changes of factors in fewer bits, and what rounding lost of them: error feedback.

Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed
Training of Speech DNNs", Interspeech 2014, where a worker adds what rounding lost to its next
gradient; Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes",
ICML 2019, arXiv:1901.09847.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float, Int, Int8
from torch import Tensor

from hafl_app.lowrank.factors import LoraFactors

_LARGEST_CODE = 127  # symmetric: -128 has no counterpart


@dataclass(frozen=True)
class Int8Factors:
    """Factors in 8 bits: every component vector has its own scale.

    Parameters
    ----------
    lora_A, scales_A
        Codes of shape ``(rank, in_features)``, and a scale for each row.
    lora_B, scales_B
        Codes of shape ``(out_features, rank)``, and a scale for each column.
    """

    lora_A: Int8[Tensor, "rank in_features"]
    scales_A: BFloat16[Tensor, " rank"]
    lora_B: Int8[Tensor, "out_features rank"]
    scales_B: BFloat16[Tensor, " rank"]

    @classmethod
    def of(cls, factors: LoraFactors) -> "Int8Factors":
        """Round every component vector to `quantize`'s codes."""
        lora_A, scales_A = quantize(factors.lora_A)
        lora_B, scales_B = quantize(factors.lora_B.T)
        return cls(lora_A, scales_A, lora_B.T, scales_B)

    def decoded(self) -> LoraFactors:
        """Return the factors that the codes stand for, in float32."""
        return LoraFactors(
            dequantize(self.lora_A, self.scales_A), dequantize(self.lora_B.T, self.scales_B).T
        )


def quantize(
    vectors: Float[Tensor, "count n"],
) -> tuple[Int8[Tensor, "count n"], BFloat16[Tensor, " count"]]:
    """Round vectors to whole multiples of a scale each, to nearest.

    ``code = round(v / scale)`` with ``scale = max |v| / 127``, rounded up to bfloat16 so that two
    bytes carry it: at most 0.8 % more. No number is off by more than half a scale. A vector of
    zeros has scale 0; one that is not finite has a scale that is not.

    Parameters
    ----------
    vectors
        Shape (count, n).

    Returns
    -------
    tuple
        Codes from -127 to 127, shape (count, n), and scales, shape (count,).
    """
    values = vectors.float()
    scales = rounded_up(largest_of(values) / _LARGEST_CODE)
    steps = values / scales.float()[:, None]
    # 0 / 0 where all is zero; what is not finite shows in the scale.
    codes = steps.nan_to_num(0.0).round().clamp(-_LARGEST_CODE, _LARGEST_CODE)
    return codes.to(torch.int8), scales


def dequantize(
    codes: Int[Tensor, "count n"], scales: BFloat16[Tensor, " count"]
) -> Float[Tensor, "count n"]:
    """Return ``scale * code`` of each vector, float32."""
    return codes.float() * scales.float()[:, None]


def largest_of(vectors: Float[Tensor, "count n"]) -> Float[Tensor, " count"]:
    """Return ``max |v|`` of each vector; 0 of one without numbers."""
    return vectors.abs().amax(1) if vectors.numel() else vectors.new_zeros(len(vectors))


def rounded_up(values: Float[Tensor, " count"]) -> BFloat16[Tensor, " count"]:
    """Return the smallest bfloat16 numbers that are not below these, which are not negative."""
    nearest = values.to(torch.bfloat16)
    # Of numbers that are not negative, the next larger one has the next larger bits.
    above = (nearest.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(nearest.float() < values, above, nearest)


@dataclass(frozen=True)
class RoundingErrors:
    """Rounding errors of a module's components that were not uploaded yet.

    Parameters
    ----------
    components
        Indices into the global adapter, distinct.
    errors
        Their component vectors, in that order: float32, rank ``len(components)``.
    """

    components: tuple[int, ...]
    errors: LoraFactors

    @classmethod
    def none(cls, like: LoraFactors) -> "RoundingErrors":
        """Return errors of zero for a module whose factors are as wide as these."""
        return cls((), like.select([]))

    def added_to(self, change: LoraFactors, components: Sequence[int]) -> LoraFactors:
        """Return a change with what earlier ones of the same components still lack.

        Parameters
        ----------
        components
            Global indices of the change's components.
        """
        place = {component: i for i, component in enumerate(components)}
        known = [(i, place[c]) for i, c in enumerate(self.components) if c in place]
        kept = self.errors.select([i for i, _ in known])
        there = [j for _, j in known]
        now = change.select(there)
        both = LoraFactors(now.lora_A + kept.lora_A, now.lora_B + kept.lora_B)
        return change.replace(there, both)

    def after(
        self,
        wanted: LoraFactors,
        rounded: LoraFactors,
        components: Sequence[int],
        asked: Sequence[int],
    ) -> "RoundingErrors":
        """Return the errors that remain once a change has been uploaded.

        Errors that are not finite are dropped, or they would spoil every later change.

        Parameters
        ----------
        wanted, rounded
            The change with what was `added_to` it, and what the server reads.
        components
            Their global indices.
        asked
            Those that were to be uploaded. What is asked and not uploaded was pruned: it keeps
            nothing back.
        """
        stay = [i for i, component in enumerate(self.components) if component not in set(asked)]
        old = self.errors.select(stay)
        lora_A = (wanted.lora_A - rounded.lora_A).nan_to_num(0.0, 0.0, 0.0)
        lora_B = (wanted.lora_B - rounded.lora_B).nan_to_num(0.0, 0.0, 0.0)
        return RoundingErrors(
            (*(self.components[i] for i in stay), *components),
            LoraFactors(torch.cat([old.lora_A, lora_A]), torch.cat([old.lora_B, lora_B], dim=1)),
        )
