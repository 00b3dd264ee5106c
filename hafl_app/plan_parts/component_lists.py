"""Lists of components as text: indices, and the bits of each, in few characters."""

import re
from collections.abc import Iterable
from itertools import groupby

BIT_LEVELS = (0, 2, 4, 8, 16)
"""Bits that a number of a component may have with ``mixed``; with 0 it is not uploaded."""

# "0-99999999999" is short to write and long to expand; no adapter has that many components.
_MAX_COMPONENTS = 2**16
_RUN = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_REPEATED = re.compile(r"(0|2|4|8|16)(?:x([1-9][0-9]{0,4}))?")


def format_indices(indices: Iterable[int]) -> str:
    """Write component indices compactly, in their order: ``(0, 1, 2, 5)`` is ``"0-2,5"``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)


def parse_indices(text: str) -> tuple[int, ...]:
    """Parse component indices written by `format_indices`.

    Raises
    ------
    ValueError
        If ``text`` is not of that form, or means more than 65,536 components.
    """
    indices: list[int] = []
    for run in text.split(",") if text else []:
        match = _RUN.fullmatch(run)
        if not match:
            raise ValueError(f"component indices: {run[:40]!r} is not like '3' or '3-7'")
        start, stop = int(match[1]), int(match[2] or match[1])
        if start > stop:
            raise ValueError(f"component indices: {run!r} runs backwards")
        if len(indices) + stop - start >= _MAX_COMPONENTS:
            raise ValueError(f"component indices: more than {_MAX_COMPONENTS} at {run!r}")
        indices.extend(range(start, stop + 1))
    return tuple(indices)


def format_bits(bits: Iterable[int]) -> str:
    """Write bits of components as run lengths: ``(16, 16, 8, 0)`` is ``"16x2,8,0"``."""
    runs = [(level, len(list(same))) for level, same in groupby(bits)]
    return ",".join(f"{level}x{count}" if count > 1 else f"{level}" for level, count in runs)


def parse_bits(text: str) -> tuple[int, ...]:
    """Parse bits written by `format_bits`; any other spelling is rejected.

    Raises
    ------
    ValueError
        If ``text`` is not of that form, or means more than 65,536 components.
    """
    bits: list[int] = []
    for run in text.split(",") if text else []:
        match = _REPEATED.fullmatch(run)
        if not match:
            raise ValueError(f"bits: {run[:40]!r} is not like '8' or '8x3', of {BIT_LEVELS}")
        count = int(match[2] or 1)
        if len(bits) + count > _MAX_COMPONENTS:
            raise ValueError(f"bits: more than {_MAX_COMPONENTS} components at {run!r}")
        bits.extend([int(match[1])] * count)
    if format_bits(bits) != text:
        raise ValueError(f"bits: {text[:40]!r} is {format_bits(bits)[:40]!r} written otherwise")
    return tuple(bits)
