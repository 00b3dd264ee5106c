"""Limits of unauthenticated connections: their number, header size and silence.

uvicorn bounds what it holds of a body, but neither the number of connections nor the time until a
request's headers are whole, and with httptools not their length either. Its parser h11 stops at
16 KiB of headers.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 512
"""Open at once; each costs about 300 KB for TLS."""

MOST_PER_ADDRESS = 256
"""Open at once of one address, behind which many nodes may be."""

QUIET_SECONDS = 20.0
"""Without a request being answered, a connection is closed after so long."""

NODE_QUIET_SECONDS = 40
"""The same for a connection on which a registered node has called: while it trains it says no more
than Flower's heartbeat, every 21 to 27 seconds, and the end of its connection says that it died."""

NODE, PRESENCE = "node", "presence"
"""Keys of the state of a request: the public key of the node that made it, and the
`hafl_app.deployment.presence.Presence` that is told of its connections, where there is one."""

_HARD_CLOSE_SECONDS = 5.0


class BoundedConnection(H11Protocol):
    """A connection that ends when it brings no whole request, or is one too many."""

    most = MOST_CONNECTIONS
    most_per_address = MOST_PER_ADDRESS
    quiet_s = QUIET_SECONDS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._quiet_since = self.loop.time()
        self._node: bytes | None = None
        self._watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, or close it at once if there are too many."""
        super().connection_made(transport)
        address = self.client[0] if self.client else None
        same = sum(c.client is not None and c.client[0] == address for c in self.connections)
        if len(self.connections) > self.most or same > self.most_per_address:
            self.logger.warning("%s: too many connections, this one is closed", address)
            transport.abort()
            return
        self._watch_on()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching."""
        super().connection_lost(exc)
        self._note_node()  # of a call that was not answered yet, too
        self._let_go()
        if self._watch is not None:
            self._watch.cancel()

    def on_response_complete(self) -> None:
        """Count the quiet from here on."""
        self._quiet_since = self.loop.time()
        self._note_node()
        super().on_response_complete()
        if self.transport.is_closing():
            # A TLS peer that does not say good-bye, or does not stop sending, is not waited for.
            self.loop.call_later(_HARD_CLOSE_SECONDS, self.transport.abort)

    def _note_node(self) -> None:
        """Keep a registered node's connection longer, and tell whose it is."""
        node = self.scope["state"].get(NODE) if self.scope else None
        if node is None or node == self._node:
            return
        self._let_go()  # of another one, behind the same proxy
        self._node = node
        self.timeout_keep_alive = self.quiet_s = NODE_QUIET_SECONDS
        if PRESENCE in self.app_state:
            self.app_state[PRESENCE].holds(node, id(self))

    def _let_go(self) -> None:
        if self._node is not None and PRESENCE in self.app_state:
            self.app_state[PRESENCE].lost(self._node, id(self))

    def _watch_on(self) -> None:
        busy = self.cycle is not None and not self.cycle.response_complete
        if not busy and self.loop.time() - self._quiet_since > self.quiet_s:
            self.transport.abort()
            return
        self._watch = self.loop.call_later(self.quiet_s / 4, self._watch_on)
