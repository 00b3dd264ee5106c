"""Changes of factors with as many bits for each component as it was given.

HAFLQ, Su, Yan and Deng, arXiv:2411.06581v2, quantizes uploads by importance; its formulas could
not be read, so codes, scales and rounding are reconstructed. Random rounding to few bits: Wen et
al., "TernGrad", NeurIPS 2017, arXiv:1705.07878. Shrinking what is unbiased, so that errors which
are fed back stay bounded: Beznosikov et al., "On Biased Compression for Distributed Learning", JMLR
2023, arXiv:2002.12410.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float, Int16
from torch import Tensor

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.quantize import dequantize, largest_of, rounded_up
from hafl_app.plan_parts.number_formats import largest_code

STOCHASTIC_BITS = 4
"""Up to so many bits codes are drawn at random between the two next to a number."""


@dataclass(frozen=True)
class MixedFactors:
    """Factors whose components differ in bits: every component vector has its own scale.

    Parameters
    ----------
    lora_A, scales_A
        Codes of shape ``(rank, in_features)``, and a scale for each row.
    lora_B, scales_B
        Codes of shape ``(out_features, rank)``, and a scale for each column.
    """

    lora_A: Int16[Tensor, "rank in_features"]
    scales_A: BFloat16[Tensor, " rank"]
    lora_B: Int16[Tensor, "out_features rank"]
    scales_B: BFloat16[Tensor, " rank"]

    @classmethod
    def of(
        cls,
        factors: LoraFactors,
        bits: Sequence[int],
        *,
        contract: bool,
        generator: torch.Generator,
    ) -> "MixedFactors":
        """Round every component's two vectors to its bits, see `quantize_to`.

        Parameters
        ----------
        bits
            Of each component, from 2 to 16.
        """
        lora_A, scales_A = _by_bits(factors.lora_A, bits, contract, generator)
        lora_B, scales_B = _by_bits(factors.lora_B.T, bits, contract, generator)
        return cls(lora_A, scales_A, lora_B.T, scales_B)

    def decoded(self) -> LoraFactors:
        """Return the factors that the codes stand for, in float32."""
        return LoraFactors(
            dequantize(self.lora_A, self.scales_A), dequantize(self.lora_B.T, self.scales_B).T
        )


def _by_bits(
    vectors: Float[Tensor, "count n"],
    bits: Sequence[int],
    contract: bool,
    generator: torch.Generator,
) -> tuple[Int16[Tensor, "count n"], BFloat16[Tensor, " count"]]:
    codes = torch.zeros(vectors.shape, dtype=torch.int16)
    scales = torch.zeros(len(vectors), dtype=torch.bfloat16)
    for level in sorted(set(bits)):
        rows = [i for i, b in enumerate(bits) if b == level]
        codes[rows], scales[rows] = quantize_to(
            vectors[rows], level, contract=contract, generator=generator
        )
    return codes, scales


def quantize_to(
    vectors: Float[Tensor, "count n"],
    bits: int,
    *,
    contract: bool,
    generator: torch.Generator,
) -> tuple[Int16[Tensor, "count n"], BFloat16[Tensor, " count"]]:
    """Round vectors to whole multiples of a scale each, in so many bits.

    ``code = round(v / s)`` with ``s = max |v| / (2^(bits-1) - 1)`` rounded up to bfloat16. Above
    `STOCHASTIC_BITS` to nearest: no number is off by more than ``s / 2``. Up to it at random to one
    of the two next codes, so that the mean of many is the number itself: with few bits rounding to
    nearest would lose all small numbers. On average it loses a square of ``w ||v||^2``, with
    ``w = s^2 sum_i p_i (1 - p_i) / ||v||^2`` and p_i the chance of the upper code. With 2 bits w is
    mostly above 1, and errors that are fed back would grow from upload to upload. With ``contract``
    the scale is therefore ``s / (1 + w)``, which loses ``w / (1 + w) ||v||^2``, always less than
    all.

    Parameters
    ----------
    vectors
        Shape (count, n).
    bits
        From 2 to 16.
    contract
        Whether what is lost is fed back.
    generator
        Source of randomness, on the CPU; not used above `STOCHASTIC_BITS`.

    Returns
    -------
    tuple
        Codes within `largest_code`, shape (count, n), and scales, shape (count,): 0 for a vector of
        zeros, not finite for one that is not.
    """
    values, most = vectors.float(), largest_code(bits)
    scales = rounded_up(largest_of(values) / most)
    # 0 / 0 where all is zero; what is not finite shows in the scale.
    steps = (values / scales.float()[:, None]).nan_to_num(0.0)
    if bits > STOCHASTIC_BITS:
        return steps.round().clamp(-most, most).to(torch.int16), scales
    below = steps.floor()
    share = steps - below  # the chance of the code above
    codes = below + (torch.rand(steps.shape, generator=generator) < share)
    if contract:
        scales = (scales.float() / (1 + _variance(steps, share))).to(torch.bfloat16)
    return codes.clamp(-most, most).to(torch.int16), scales


def _variance(
    steps: Float[Tensor, "count n"], share: Float[Tensor, "count n"]
) -> Float[Tensor, " count"]:
    """Return ``w``: the expected square of what rounding loses, over that of the vector."""
    return (share * (1 - share)).sum(1) / steps.square().sum(1).clamp(min=1e-30)
