"""Bandwidth of a node's uplink, from ``flower-supernode --node-config``."""

import re
from collections.abc import Mapping
from typing import Any

from hafl_app.config.compose import SettingsError

BANDWIDTH_KBPS = "bandwidth-kbps"
_MOST_KBPS = 10**9


def bandwidth_kbps(node_config: Mapping[str, Any]) -> int:
    """Return the uplink's bandwidth in 1000 bit/s as the operator states it; 0 if unknown.

    Raises
    ------
    SettingsError
        If it is no whole number from 1 to 10^9.
    """
    value = node_config.get(BANDWIDTH_KBPS)
    if value is None:
        return 0
    whole = re.fullmatch("[0-9]{1,10}", str(value))
    if not whole or not 1 <= int(value) <= _MOST_KBPS:
        raise SettingsError(
            f"this node's {BANDWIDTH_KBPS}={str(value)[:40]}: expected a whole number from 1 to "
            f"{_MOST_KBPS}"
        )
    return int(value)
