"""Presence: when the fence last heard each registered node, and whether it is connected, as a file.

Flower calls a node online until it has been silent for a minute. The fence sees each call, and when
a node's last connection ends, which a system closes as soon as the process is killed.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hafl_app.deployment.registered_keys import RegisteredNode

FLEET_FILE = "fleet.json"
"""Name of the file beside the logs of a deployment on one machine."""

_LOGGER = logging.getLogger("uvicorn.error")  # the one that uvicorn prints
_WRITE_SECONDS = 1.0


@dataclass
class _Seen:
    """What is known of one node: its last call, and its open connections."""

    last_call: float
    call: str
    connections: set[int] = field(default_factory=set)
    closed: float | None = None


class Presence:
    """The nodes by their public keys, as their calls and connections come and go.

    Parameters
    ----------
    clock
        Seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._seen: dict[bytes, _Seen] = {}

    def called(self, key: bytes, call: str) -> None:
        """Record a call, e.g. ``pull-messages``, of a registered node."""
        seen = self._seen.setdefault(key, _Seen(0.0, ""))
        seen.last_call, seen.call = self._clock(), call

    def holds(self, key: bytes, connection: int) -> None:
        """Record that a connection, by a number of its own, is a node's."""
        self._seen[key].connections.add(connection)

    def lost(self, key: bytes, connection: int) -> None:
        """Record the end of a node's connection."""
        seen = self._seen[key]
        seen.connections.discard(connection)
        if not seen.connections:
            seen.closed = self._clock()

    def to_json(self, registered: Mapping[bytes, RegisteredNode]) -> dict[str, Any]:
        """Return all registered nodes: times in seconds since 1970, null where there is none."""
        return {
            "written": self._clock(),
            "nodes": [self._node(key, node) for key, node in registered.items()],
        }

    def _node(self, key: bytes, node: RegisteredNode) -> dict[str, Any]:
        known: dict[str, Any] = {"node_id": node.node_id, "name": node.name}
        seen = self._seen.get(key)
        if seen is None:
            return {**known, "connected": False, "last_call": None, "call": "", "closed": None}
        return {
            **known,
            "connected": bool(seen.connections),
            "last_call": seen.last_call,
            "call": seen.call,
            "closed": seen.closed,
        }


async def keep_written(
    presence: Presence, registered: Callable[[], Mapping[bytes, RegisteredNode]], file: Path
) -> None:
    """Write the nodes into a file every second, so that a reader sees the old or the new one.

    A disk that does not take it is logged once; the calls of nodes go on.
    """
    failed = False
    while True:
        text = json.dumps(presence.to_json(registered()), indent=1)
        try:
            await asyncio.to_thread(_replace, file, text)
            failed = False
        except OSError as error:
            if not failed:
                _LOGGER.warning("%s is not written: %s", file, error)
            failed = True
        await asyncio.sleep(_WRITE_SECONDS)


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
