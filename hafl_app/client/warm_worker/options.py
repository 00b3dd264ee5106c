"""Options of a node's warm worker, from ``flower-supernode --node-config``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hafl_app.client.node_config import NodeConfigError

WORKER, NAME, IDLE, GPUS = "worker", "worker-name", "worker-idle-s", "worker-gpus"
_LOOPBACK = ("127.0.0.1", "localhost")
_IDLE_SECONDS = 1800.0


class WorkerOptionsError(NodeConfigError):
    """A node config with malformed worker options."""


@dataclass(frozen=True)
class WorkerOptions:
    """Options of the worker that answers for a node.

    Parameters
    ----------
    port
        Of the node's own Ray on the loopback, from 1 to 65535.
    name
        Nodes of one name share a worker.
    idle_s
        Seconds without a message after which the worker ends, above 0.
    gpus
        GPUs, or a share of one, that Ray sets aside for the worker; None: one if Ray has one.
    """

    port: int
    name: str
    idle_s: float = _IDLE_SECONDS
    gpus: float | None = None

    @classmethod
    def of(cls, node_config: Mapping[str, Any], node_id: int) -> "WorkerOptions | None":
        """Read a node config; None if it asks for no worker.

        Parameters
        ----------
        node_config
            ``worker='127.0.0.1:6390'``; optional ``worker-name``, by default the node's own,
            ``worker-idle-s`` and ``worker-gpus``.
        node_id
            Flower's number of the node.

        Raises
        ------
        WorkerOptionsError
            If a value is malformed, or the address is not on the loopback.
        """
        address = str(node_config.get(WORKER, "")).strip()
        if not address:
            return None
        idle_s = _number(node_config, IDLE, _IDLE_SECONDS)
        if idle_s == 0:
            raise WorkerOptionsError(IDLE, "seconds above 0", 0)
        return cls(
            port=_port(address),
            name=_name(node_config, node_id),
            idle_s=idle_s,
            gpus=_number(node_config, GPUS, 0.0) if GPUS in node_config else None,
        )


def _port(address: str) -> int:
    host, _, port = address.rpartition(":")
    if host not in _LOOPBACK or not port.isdecimal() or not 0 < int(port) < 65536:
        # What listens elsewhere could be reached, and could read the node's data, from elsewhere.
        raise WorkerOptionsError(WORKER, "127.0.0.1:PORT", address)
    return int(port)


def _name(node_config: Mapping[str, Any], node_id: int) -> str:
    name = str(node_config.get(NAME, f"node-{node_id}"))
    if not name or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise WorkerOptionsError(NAME, "letters, digits and .-_", name)
    return name


def _number(node_config: Mapping[str, Any], key: str, default: float) -> float:
    given = node_config.get(key, default)
    try:
        number = float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise WorkerOptionsError(key, "a number from 0", given)
    return number
