"""Passing calls on to the SuperLink: who calls comes first, then how much, then the body."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress

import httpx
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from hafl_app.deployment.body_limits import BodyLimits, BodyRoom, in_time
from hafl_app.deployment.connections import NODE
from hafl_app.deployment.node_signatures import SignatureError, authenticated_key

_LOGGER = logging.getLogger("uvicorn.error")  # the one that uvicorn prints

# RFC 9110, section 7.6.1: these belong to one connection, not to the message.
_HOP_BY_HOP = frozenset(
    (
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization"),
        *("proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
    )
)
_SKIPPED_BYTES = 64 * 2**10  # of a refused body are read, so that its sender reads the answer


class Proxy:
    """An ASGI app that passes a request on and frees all it holds, however the call ends."""

    def __init__(self, ask: Callable[[Request, AsyncExitStack], Awaitable[httpx.Response]]) -> None:
        self._ask = ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        limits: BodyLimits = request.app.state.room.limits
        # A caller that is gone, or takes too long over a reply, is not answered.
        with suppress(ClientDisconnect, TimeoutError):
            async with asyncio.timeout(limits.call_s), AsyncExitStack() as stack:
                try:
                    reply = await self._ask(request, stack)
                except httpx.TransportError as error:
                    raise HTTPException(502, f"SuperLink: {type(error).__name__}") from error
                stack.push_async_callback(reply.aclose)
                passed_on = StreamingResponse(
                    reply.aiter_raw(),
                    status_code=reply.status_code,
                    headers=dict(_end_to_end(reply.headers)),
                )
                await passed_on(scope, receive, send)


async def ask_health(request: Request, _stack: AsyncExitStack) -> httpx.Response:
    """Ask the SuperLink for its health; open to all, without forwarding a body."""
    client: httpx.AsyncClient = request.app.state.client
    onward = client.build_request(
        request.method, "/health", headers=_without_body(_end_to_end(request.headers))
    )
    return await client.send(onward, stream=True)


async def ask_for_node(request: Request, stack: AsyncExitStack) -> httpx.Response:
    """Pass a node's call on: who calls comes first, then how much, then the body."""
    state = request.app.state
    room: BodyRoom = state.room
    node = await authenticated_key(request.headers, state.registered)
    request.scope["state"][NODE] = node
    state.presence.called(node, request.scope["path"].rpartition("/")[2])
    await stack.enter_async_context(room.call(node))
    size = _stated_length(request)
    # The path is one of the list, so nothing of the caller's URL goes on: no query, no encoding.
    onward = state.client.build_request(
        request.method,
        request.scope["path"],
        headers=_end_to_end(request.headers),
        content=in_time(request.stream(), size, room.limits),
    )
    async with room.reserve(node, size):
        reply: httpx.Response = await state.client.send(onward, stream=True)
    return reply


def _stated_length(request: Request) -> int:
    length = request.headers.get("content-length", "")
    if "transfer-encoding" in request.headers or not re.fullmatch(r"[0-9]{1,18}", length):
        raise HTTPException(411, "expected a body of stated length")
    return int(length)


async def refuse(request: Request, error: Exception) -> PlainTextResponse:
    """Answer a caller who is not let through, and log why."""
    assert isinstance(error, HTTPException)  # registered for no other
    caller = request.client.host if request.client else "?"
    path = request.scope["path"]
    why = error.__cause__ if isinstance(error.__cause__, SignatureError) else error.detail
    _LOGGER.warning("%s %s %.200r: %s", caller, request.method, path, why)
    return PlainTextResponse(error.detail, error.status_code, _headers_of_refusal(request))


def _headers_of_refusal(request: Request) -> dict[str, str]:
    """Return the headers that close a connection on which a long body is still to come."""
    length = request.headers.get("content-length", "0")
    short = length.isdecimal() and len(length) < 6 and int(length) <= _SKIPPED_BYTES
    if short and "transfer-encoding" not in request.headers:
        return {}
    return {"connection": "close"}


def _end_to_end(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    named = {name.strip().lower() for name in headers.get("connection", "").split(",")}
    dropped = _HOP_BY_HOP | named | {"host"}
    return [(name, value) for name, value in headers.items() if name.lower() not in dropped]


def _without_body(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() != "content-length"]
