"""Bit packing: codes of 2 to 16 bits as bytes, vector by vector, read from untrusted senders.

A code ``c`` is written as ``c + 2^(b-1) - 1``, which leaves one word of b bits unused; the bits
that fill a vector's last byte are 0. So a vector has one spelling, and others are rejected.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord

from hafl_app.plan_parts.component_lists import parse_bits
from hafl_app.plan_parts.number_formats import largest_code
from hafl_app.wire.arrays import Numbers, RecordError, read_names, read_sizes

Pair = tuple[Numbers, Numbers]
_BYTE, _RAW = 8, "raw"
_WORD = {8: "u1", 16: "<u2"}


def packed_size(bits: int, length: int) -> int:
    """Return the bytes of a vector of ``length`` codes of ``bits`` bits."""
    return -(-bits * length // _BYTE)


def write_packed(data: Numbers) -> Array:
    """Write packed bytes: without a header, as other numbers that are not float32."""
    return Array("uint8", data.shape, _RAW, data.tobytes())


def read_packed(arrays: ArrayRecord, key: str) -> Numbers:
    """Read the packed bytes of `write_packed`, uint8.

    Raises
    ------
    RecordError
        If the array is missing, or of another kind.
    """
    array = arrays.get(key)
    if array is None or (array.dtype, array.stype) != ("uint8", _RAW):
        kind = "missing" if array is None else f"of dtype {array.dtype!r} as {array.stype!r}"
        raise RecordError(f"arrays: {key!r} is {kind}, expected uint8 as {_RAW!r}")
    if array.shape != (len(array.data),):
        raise RecordError(
            f"arrays: {key!r} cannot be read: {len(array.data)} bytes for shape {array.shape}"
        )
    return np.frombuffer(array.data, np.uint8)


def read_bits(layout: Mapping[str, Any], key: str) -> dict[str, tuple[int, ...]]:
    """Read the bits of every module's components: as many as its rank, none of them 0.

    Raises
    ------
    RecordError
        If they are anything else.
    """
    names, texts = read_names(layout, "modules"), layout[key]
    ranks = read_sizes(layout, "ranks", len(names))
    if not isinstance(texts, list) or len(texts) != len(names):
        raise RecordError(f"layout: {key!r} is no list of texts for {len(names)} modules")
    return {
        name: _read_bits(text, rank) for name, text, rank in zip(names, texts, ranks, strict=True)
    }


def _read_bits(text: object, rank: int) -> tuple[int, ...]:
    try:
        bits = parse_bits(text) if isinstance(text, str) else ()
    except ValueError as error:
        raise RecordError(f"layout: {error}") from error
    if len(bits) != rank or 0 in bits:
        raise RecordError(f"layout: bits {str(text)[:40]!r} of {rank} components, none of them 0")
    return bits


def pack_pairs(pairs: Mapping[str, Pair], bits: Mapping[str, tuple[int, ...]]) -> Numbers:
    """Pack all factors, uint8: of each module the rows of lora_A, then the columns of lora_B.

    Parameters
    ----------
    pairs
        Module name to codes of ``lora_A (rank, in_features)`` and ``lora_B (out_features, rank)``,
        within `largest_code` of their component's bits. A factor without features adds nothing.
    bits
        Module name to the bits of its components: 2, 4, 8 or 16.
    """
    rows = (
        _pack(row, b)
        for name, (lora_A, lora_B) in pairs.items()
        for vectors in (lora_A, lora_B.T)
        for row, b in zip(vectors, bits[name], strict=True)
    )
    return np.concatenate([np.zeros(0, np.uint8), *rows])


def unpack_pairs(
    layout: Mapping[str, Any], bits: Mapping[str, tuple[int, ...]], data: Numbers
) -> dict[str, Pair]:
    """Unpack the factors of `pack_pairs`, as int16.

    Raises
    ------
    RecordError
        If there are too few or too many bytes, a code is out of its range, or padding bits are
        not 0.
    """
    widths, heights = (read_sizes(layout, k, len(bits)) for k in ("in-features", "out-features"))
    lengths = [length for pair in zip(widths, heights, strict=True) for length in pair]
    levels = [of_module for of_module in bits.values() for _ in ("lora_A", "lora_B")]
    sizes = [
        [packed_size(b, length) for b in of_module]
        for of_module, length in zip(levels, lengths, strict=True)
    ]
    if len(data) != (expected := sum(map(sum, sizes))):
        raise RecordError(f"factors: {len(data)} bytes, the layout says {expected}")
    ends = np.cumsum([0, *map(sum, sizes)], dtype=np.int64)
    parts = [
        _unpack_vectors(data[start:], of_module, length)
        for start, of_module, length in zip(ends[:-1], levels, lengths, strict=True)
    ]
    pairs = zip(parts[::2], (part.T for part in parts[1::2]), strict=True)
    return dict(zip(bits, pairs, strict=True))


def _unpack_vectors(data: Numbers, bits: Sequence[int], length: int) -> Numbers:
    """Unpack a vector for each entry of ``bits`` from the start; shape (count, length)."""
    codes = np.zeros((len(bits), length), np.int16)
    start = 0
    for row, b in zip(codes, bits, strict=True):
        end = start + packed_size(b, length)
        row[:] = _unpack(data[start:end], b, length)
        start = end
    return codes


def _pack(codes: Numbers, bits: int) -> Numbers:
    words = codes.astype(np.int32) + largest_code(bits)
    if bits in _WORD:
        return np.frombuffer(words.astype(_WORD[bits]).tobytes(), np.uint8)
    per_byte = _BYTE // bits
    padded = np.zeros(packed_size(bits, len(codes)) * per_byte, np.uint8)
    padded[: len(codes)] = words
    shifts = np.arange(per_byte, dtype=np.uint8) * bits  # the first code in the lowest bits
    packed: Numbers = np.bitwise_or.reduce(padded.reshape(-1, per_byte) << shifts, axis=1)
    return packed


def _unpack(data: Numbers, bits: int, length: int) -> Numbers:
    if bits in _WORD:
        words = np.frombuffer(data.tobytes(), _WORD[bits]).astype(np.int32)
    else:
        shifts = np.arange(_BYTE // bits, dtype=np.uint8) * bits
        words = ((data[:, None] >> shifts) & (2**bits - 1)).ravel().astype(np.int32)
    if words[length:].any():
        raise RecordError(f"factors: bits behind the last of {length} codes, expected 0")
    most = largest_code(bits)
    codes: Numbers = words[:length] - most
    if len(codes) and (largest := codes.max()) > most:
        raise RecordError(f"factors: code {largest} of {bits} bits, expected {-most} to {most}")
    return codes
