"""Number formats of an upload, and how many bytes its numbers take."""

from collections.abc import Mapping
from typing import Literal

NumberFormat = Literal["fp32", "bf16", "int8", "mixed", "sparse"]

NUMBER_BYTES: Mapping[NumberFormat, int] = {
    "fp32": 4,
    "bf16": 2,
    "int8": 1,
    "mixed": 2,
    "sparse": 4,
}
"""Bytes of a number in each format; of ``mixed``, where every component has its own, at most.

Of ``sparse`` only the numbers that are kept travel, with a bit for each number there is."""

_SCALE_BYTES = 2  # bfloat16; a component has one for its row of lora_A, and one for its column


def largest_code(bits: int) -> int:
    """Return the largest code of ``bits`` bits; the smallest is its negative, and one is unused."""
    return int(2 ** (bits - 1) - 1)


def component_bytes(bits: int, out_features: int, in_features: int) -> int:
    """Return the bytes of one component in an upload: its vectors of codes, a scale for each.

    ``ceil(b m / 8) + 2 + ceil(b n / 8) + 2`` for a weight of m x n; 0 for 0 bits.

    Parameters
    ----------
    out_features, in_features
        Of the weight; 0 for the factor that is not uploaded, see `ModulePlan.uploaded_sides`.
    """
    lengths = (length for length in (out_features, in_features) if length and bits)
    return sum(-(-bits * length // 8) + _SCALE_BYTES for length in lengths)
