"""Bandwidth of a node's uplink, from ``flower-supernode --node-config``."""

from collections.abc import Mapping
from typing import Any

from hafl_app.client.node_config import whole_number

BANDWIDTH_KBPS = "bandwidth-kbps"
_MOST_KBPS = 10**9


def bandwidth_kbps(node_config: Mapping[str, Any]) -> int:
    """Return the uplink's bandwidth in 1000 bit/s as the operator states it; 0 if unknown.

    Raises
    ------
    hafl_app.client.node_config.NodeConfigError
        If it is no whole number from 1 to 10^9.
    """
    return whole_number(node_config, BANDWIDTH_KBPS, 1, _MOST_KBPS) or 0
