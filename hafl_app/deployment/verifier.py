"""The verifier: answers nginx (`auth_request`) whether a registered node makes a call.

nginx stands before the SuperLink, asks here with a call's headers, and reads its body only after a
yes::

    python -m hafl_app.deployment.verifier --ca credentials/ca.crt --port 8444

`docs/deploying.md` has nginx's side. It listens on the loopback alone.
"""

import argparse
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hafl_app.deployment.connections import BoundedConnection
from hafl_app.deployment.node_signatures import authenticated_key
from hafl_app.deployment.registered_keys import (
    RegisteredKeys,
    keys_of_superlink,
    superlink_client,
)

_LOOPBACK = "127.0.0.1"


class _Connection(BoundedConnection):
    most = most_per_address = 4096  # all are nginx's


def verifier(
    superlink: str, ca: Path | None = None, *, transport: httpx.AsyncBaseTransport | None = None
) -> Starlette:
    """Return the ASGI app: `/verify` answers 204 to a registered node's headers.

    It answers 403 to those of a node that is not registered, 401 to unsigned ones, and 502 if
    the SuperLink is silent.

    Parameters
    ----------
    superlink, ca, transport
        See `hafl_app.deployment.fence.fence`.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with superlink_client(superlink, ca, transport) as client:
            app.state.registered = RegisteredKeys(keys_of_superlink(client))
            yield

    return Starlette(
        routes=[
            Route("/verify", _verify, methods=["GET"]),
            Route("/health", _health, methods=["GET"]),
        ],
        lifespan=lifespan,
    )


async def _verify(request: Request) -> Response:
    try:
        await authenticated_key(request.headers, request.app.state.registered)
    except HTTPException as error:
        # `auth_request` knows 401 and 403 alone; all else is an error to it.
        return Response(status_code=403 if error.status_code == 412 else error.status_code)
    return Response(status_code=204)


async def _health(_request: Request) -> Response:
    return Response(status_code=200)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the verifier until it is stopped."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.ca.is_file():
        parser.error(f"argument --ca: {options.ca} is missing")
    uvicorn.run(
        verifier(options.superlink, options.ca),
        host=_LOOPBACK,
        port=options.port,
        http=_Connection,
        ws="none",
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hafl_app.deployment.verifier",
        description="Answer nginx whether a registered node makes a call, by the call's headers.",
    )
    parser.add_argument("--ca", type=Path, required=True, help="ca.crt of make_credentials.py")
    parser.add_argument("--superlink", default="127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8444, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    main()
