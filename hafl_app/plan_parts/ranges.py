"""Ranges of a plan's values, which come over the wire and may be anything."""

import sys


def require(holds: bool, name: str, expected: str, value: object) -> None:
    """Refuse a value that is not what was expected.

    Raises
    ------
    ValueError
        Naming the value, what was expected and what it is.
    """
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def is_whole(value: object, at_least: int) -> bool:
    """Whether a value is a whole number from ``at_least``, and no boolean."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def is_finite(value: object) -> bool:
    """Whether a value is a finite number, and no boolean."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # also False for NaN, and for an int beyond a float
