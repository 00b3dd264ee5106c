"""Limits of the bytes of requests under way to the SuperLink, and of their speed.

The SuperLink holds every body in memory until its last byte is there. So a body is let in by its
stated length, when there is room for all of it, and must then keep coming.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.exceptions import HTTPException


@dataclass(frozen=True)
class BodyLimits:
    """Limits of one fence; Flower cuts arrays into pieces of 5 MiB, a node sends two at once.

    Parameters
    ----------
    body, node, total
        Bytes of one request, of one node's requests together, and of all. Each is at least the
        one before.
    node_calls
        Calls of one node at a time.
    turn_s
        Seconds that a request waits for room.
    window_s, window_bytes
        So many bytes must come in so many seconds, until the body is whole.
    body_s, call_s
        Seconds for a whole body, and for a whole call with its reply.
    """

    body: int = 32 * 2**20
    node: int = 64 * 2**20
    total: int = 256 * 2**20
    node_calls: int = 16
    turn_s: float = 60.0
    window_s: float = 30.0
    window_bytes: int = 64 * 2**10
    body_s: float = 600.0
    call_s: float = 900.0


class BodyRoom:
    """Room for bodies, shared by all nodes."""

    def __init__(self, limits: BodyLimits) -> None:
        self.limits = limits
        self._bytes: Counter[bytes] = Counter()
        self._calls: Counter[bytes] = Counter()
        self._freed = asyncio.Condition()

    @asynccontextmanager
    async def call(self, node: bytes) -> AsyncIterator[None]:
        """Count a call of a node while it lasts.

        Raises
        ------
        starlette.exceptions.HTTPException
            503, on which nodes try again, if the node has too many open.
        """
        if self._calls[node] >= self.limits.node_calls:
            raise HTTPException(503, f"more than {self.limits.node_calls} calls of one node")
        self._calls[node] += 1
        try:
            yield
        finally:
            self._calls[node] -= 1
            self._calls += Counter()  # drops those at zero

    @asynccontextmanager
    async def reserve(self, node: bytes, size: int) -> AsyncIterator[None]:
        """Wait for room for a body, and keep it until the SuperLink has answered.

        Raises
        ------
        starlette.exceptions.HTTPException
            413 if it is too long for any; 503 if there is no room in time.
        """
        if size > self.limits.body:
            raise HTTPException(413, f"expected at most {self.limits.body} bytes")
        try:
            async with asyncio.timeout(self.limits.turn_s), self._freed:
                await self._freed.wait_for(lambda: self._fits(node, size))
                self._bytes[node] += size
        except TimeoutError as error:
            raise HTTPException(503, "too many bytes of other calls are under way") from error
        try:
            yield
        finally:
            async with self._freed:
                self._bytes[node] -= size
                self._bytes += Counter()
                self._freed.notify_all()

    def _fits(self, node: bytes, size: int) -> bool:
        within_node = self._bytes[node] + size <= self.limits.node
        return within_node and self._bytes.total() + size <= self.limits.total


async def in_time(
    body: AsyncIterator[bytes],
    size: int,
    limits: BodyLimits,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[bytes]:
    """Yield a body's pieces while they come fast enough.

    Only time spent waiting for the caller counts, not that of a SuperLink slow to take them.

    Parameters
    ----------
    size
        Its stated length, in bytes; a server has checked it.

    Raises
    ------
    starlette.exceptions.HTTPException
        503, on which nodes try again (on 408 they do not), if they come too slowly.
    """
    waited, in_window, window_bytes, received = 0.0, 0.0, 0, 0
    while received < size:
        started = clock()
        patience = min(limits.window_s - in_window, limits.body_s - waited)
        try:
            async with asyncio.timeout(max(0.0, patience)):
                piece = await anext(body)
        except TimeoutError as error:
            raise HTTPException(503, f"{received} of {size} bytes came, too slowly") from error
        except StopAsyncIteration:
            return
        took = clock() - started
        waited, in_window = waited + took, in_window + took
        received, window_bytes = received + len(piece), window_bytes + len(piece)
        if window_bytes >= limits.window_bytes:
            in_window, window_bytes = 0.0, 0
        yield piece
