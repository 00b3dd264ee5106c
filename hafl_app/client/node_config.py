"""Errors and numbers of a node's ``--node-config``, which its operator writes.

Standard library only: the process of a message reads it before it imports anything heavy.
"""

import math
import re
from collections.abc import Mapping
from typing import Any


class NodeConfigError(ValueError):
    """A malformed value in a node's own config; the message is one line that may leave the node.

    It names the key and never the value, which may be a path or a secret in the wrong place.

    Parameters
    ----------
    key
        Of the node config.
    expected
        What its value must be, in words.
    value
        For the node's own log alone.
    """

    def __init__(self, key: str, expected: str, value: object) -> None:
        super().__init__(f"{key} in this node's --node-config: expected {expected}")
        self.details = f"it is {str(value)[:80]!r}"


def whole_number(node_config: Mapping[str, Any], key: str, least: int, most: int) -> int | None:
    """Return a whole number that is given as one or as text; None if the key is not there.

    Raises
    ------
    NodeConfigError
        If it is anything else, or out of range.
    """
    value = node_config.get(key)
    if value is None:
        return None
    digits = not isinstance(value, bool) and re.fullmatch("[0-9]{1,18}", str(value))
    if not digits or not least <= int(value) <= most:
        raise NodeConfigError(key, f"a whole number from {least} to {most}", value)
    return int(value)


def positive_number(node_config: Mapping[str, Any], key: str) -> float | None:
    """Return a finite number above 0; None if the key is not there.

    Raises
    ------
    NodeConfigError
        If it is anything else.
    """
    value = node_config.get(key)
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise NodeConfigError(key, "a number above 0", value)
    return number
