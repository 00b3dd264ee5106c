"""The fence: what of a SuperLink may be reached from outside, and nothing else.

One port of the SuperLink serves three interfaces: Fleet (the nodes), Control (start a run,
register a node) and Runtime (the run's own processes). Flower authenticates nodes; who may use
Control and Runtime it leaves open, unless an account service is bought. So the SuperLink listens
on the loopback, and this proxy lets the nodes' calls through and refuses the rest::

    python -m hafl_app.deployment.fence --credentials FOLDER --host 0.0.0.0 --port 8443

`docs/deploying.md` has the same fence for nginx.
"""

import argparse
import logging
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from hafl_app.deployment.credentials import Credentials

_LOGGER = logging.getLogger("uvicorn.error")  # the one that uvicorn prints
NODE_CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
"""What a registered node calls below `/v1/fleet/`. Those with which a node registers itself or
leaves for good are not among them: the operator does that."""

MAX_BODY = 32 * 2**20
"""Bytes of one request at most; Flower cuts arrays into pieces of 5 MiB."""

# RFC 9110, section 7.6.1: these speak of one connection, not of the message.
_HOP_BY_HOP = frozenset(
    (
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization"),
        *("proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
    )
)
_TIMEOUT = httpx.Timeout(60.0)
# The SuperLink closes idle connections after 5 s; one that it is closing must not be used again.
_LIMITS = httpx.Limits(max_connections=None, keepalive_expiry=2.0)


def fence(
    superlink: str, ca: Path | None = None, *, transport: httpx.AsyncBaseTransport | None = None
) -> Starlette:
    """Return the proxy as an ASGI app.

    Parameters
    ----------
    superlink
        Address of the SuperLink, host:port.
    ca
        Certificate authority to check it by.
    transport
        How to reach it, if not by the network.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        verify = ssl.create_default_context(cafile=ca) if ca else True
        async with httpx.AsyncClient(
            base_url=f"https://{superlink}",
            verify=verify,
            timeout=_TIMEOUT,
            limits=_LIMITS,
            transport=transport,
            trust_env=False,  # a proxy of the environment is not the way to the loopback
        ) as client:
            app.state.client = client
            yield

    app = Starlette(
        routes=[
            Route("/health", _forward, methods=["GET"]),
            *(Route(f"/v1/fleet/{call}", _forward, methods=["POST"]) for call in NODE_CALLS),
        ],
        exception_handlers={HTTPException: _refuse},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


async def _forward(request: Request) -> StreamingResponse:
    client: httpx.AsyncClient = request.app.state.client
    # The path is one of the list, so nothing of the caller's URL goes on: no query, no encoding.
    onward = client.build_request(
        request.method,
        request.scope["path"],
        headers=_end_to_end(request.headers),
        content=_body(request) if request.method == "POST" else None,
    )
    try:
        reply = await client.send(onward, stream=True)
    except httpx.TransportError as error:
        raise HTTPException(502, f"SuperLink: {type(error).__name__}") from error
    return StreamingResponse(
        reply.aiter_raw(),
        status_code=reply.status_code,
        headers=dict(_end_to_end(reply.headers)),
        background=BackgroundTask(reply.aclose),
    )


async def _refuse(request: Request, error: Exception) -> PlainTextResponse:
    assert isinstance(error, HTTPException)  # registered for no other
    caller = request.client.host if request.client else "?"
    path = request.scope["path"]
    _LOGGER.warning("%s %s %.200r: %s", caller, request.method, path, error.detail)
    return PlainTextResponse(error.detail, error.status_code)


def _end_to_end(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    named = {name.strip().lower() for name in headers.get("connection", "").split(",")}
    dropped = _HOP_BY_HOP | named | {"host"}
    return [(name, value) for name, value in headers.items() if name.lower() not in dropped]


async def _body(request: Request) -> AsyncIterator[bytes]:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY:
            raise HTTPException(413, f"expected at most {MAX_BODY} bytes")
        yield chunk


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the fence until it is stopped."""
    parser = _parser()
    options = parser.parse_args(arguments)
    credentials = Credentials(options.credentials)
    for path in (credentials.ca, credentials.server_certificate, credentials.server_key):
        if not path.is_file():
            parser.error(f"argument --credentials: {path} is missing")
    uvicorn.run(
        fence(options.superlink, credentials.ca),
        host=options.host,
        port=options.port,
        ssl_certfile=credentials.server_certificate,
        ssl_keyfile=credentials.server_key,
        access_log=False,  # every node asks every three seconds; refusals are told
        # What the SuperLink says of itself is passed on already.
        server_header=False,
        date_header=False,
        proxy_headers=False,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hafl_app.deployment.fence",
        description="Let nodes, and only nodes, through to a SuperLink on the loopback.",
    )
    parser.add_argument("--credentials", type=Path, required=True, help="of make_credentials.py")
    parser.add_argument("--superlink", default="127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--host", default="0.0.0.0", help="to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8443, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    main()
