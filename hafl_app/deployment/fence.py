"""The fence: what of a SuperLink may be reached from outside, and nothing else.

One port of the SuperLink serves three interfaces: Fleet (the nodes), Control (start a run,
register a node) and Runtime (the run's own processes). Flower authenticates nodes; who may use
Control and Runtime it leaves open, unless an account service is bought. So the SuperLink listens
on the loopback, and this proxy lets the calls of registered nodes through and refuses the rest.
Who calls is known from the headers, before any of the body is read::

    python -m hafl_app.deployment.fence --credentials FOLDER --host 0.0.0.0 --port 8443

`docs/deploying.md` has the same fence for nginx.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route

from hafl_app.deployment.body_limits import BodyLimits, BodyRoom
from hafl_app.deployment.connections import PRESENCE, BoundedConnection
from hafl_app.deployment.credentials import Credentials
from hafl_app.deployment.forwarding import Proxy, ask_for_node, ask_health, refuse
from hafl_app.deployment.presence import Presence, keep_written
from hafl_app.deployment.registered_keys import (
    RegisteredKeys,
    keys_of_superlink,
    superlink_client,
)

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
"""Calls of a registered node below `/v1/fleet/`, without those that register or unregister it: the
operator does that."""


def fence(
    superlink: str,
    ca: Path | None = None,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    limits: BodyLimits | None = None,
    fleet: Path | None = None,
) -> Starlette:
    """Return the proxy as an ASGI app.

    Parameters
    ----------
    superlink
        Address of the SuperLink, host:port.
    ca
        Certificate authority to check it by.
    transport
        Transport to it, if not the network.
    limits
        Of nodes' bodies.
    fleet
        File that says every second when each node was last heard, for `hafl dashboard`.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Presence]]:
        async with superlink_client(superlink, ca, transport) as client:
            registered = RegisteredKeys(keys_of_superlink(client))
            app.state.client, app.state.registered = client, registered
            app.state.room = BodyRoom(limits or BodyLimits())
            app.state.presence = presence = Presence()
            writing = fleet and asyncio.create_task(
                keep_written(presence, lambda: registered.nodes, fleet)
            )
            yield {PRESENCE: presence}
            if writing:
                writing.cancel()

    app = Starlette(
        routes=[
            Route("/health", Proxy(ask_health), methods=["GET"]),
            *(
                Route(f"/v1/fleet/{call}", Proxy(ask_for_node), methods=["POST"])
                for call in NODE_CALLS
            ),
        ],
        exception_handlers={HTTPException: refuse},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the fence until it is stopped."""
    parser = _parser()
    options = parser.parse_args(arguments)
    credentials = Credentials(options.credentials)
    for path in (credentials.ca, credentials.server_certificate, credentials.server_key):
        if not path.is_file():
            parser.error(f"argument --credentials: {path} is missing")
    if options.fleet and not options.fleet.absolute().parent.is_dir():
        parser.error(f"argument --fleet: no folder {options.fleet.absolute().parent}")
    uvicorn.run(
        fence(options.superlink, credentials.ca, fleet=options.fleet),
        host=options.host,
        port=options.port,
        ssl_certfile=credentials.server_certificate,
        ssl_keyfile=credentials.server_key,
        http=BoundedConnection,
        ws="none",
        access_log=False,  # every node asks every three seconds; rejected calls are logged
        # The SuperLink's own headers are passed on already.
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
    parser.add_argument(
        "--fleet",
        type=Path,
        metavar="FILE",
        help="written every second: when each node was last heard, for hafl dashboard --fleet FILE",
    )
    return parser


if __name__ == "__main__":
    main()
