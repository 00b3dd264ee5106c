"""Serving the page: on the loopback unless told otherwise, until it is stopped."""

import ipaddress
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import uvicorn

from hafl_app.dashboard.app import dashboard

_WORDS_FOR_LOOPBACK = ("localhost", "127.0.0.1")


def serve(
    root: Path, host: str, port: int, names: Sequence[str] = (), fleet_file: Path | None = None
) -> None:
    """Serve the page until Ctrl-C or SIGTERM, which end it as they should.

    Parameters
    ----------
    root
        Folder with runs.
    host, port
        Where to listen; port 0 is a free one.
    names
        Further host names that browsers may ask for.
    fleet_file
        See `hafl_app.dashboard.app.dashboard`.

    Raises
    ------
    ValueError
        If there is no such folder, or `host` is every address and none of its names is given.
    OSError
        If the address cannot be had.
    """
    if fleet_file and not fleet_file.is_file():
        raise ValueError(f"--fleet {fleet_file}: no such file; the fence writes it (--fleet)")
    app = dashboard(root, _hosts(host, names), fleet_file)
    with _listener(host, port) as listener:
        print(_greeting(root, host, listener.getsockname()[1]), flush=True)
        if not _is_loopback(host):
            print(
                f"warning: whoever reaches {host} sees these runs; there is no password",
                file=sys.stderr,
                flush=True,
            )
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            ws="none",
            server_header=False,
            proxy_headers=False,
        )
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def _hosts(host: str, names: Sequence[str]) -> list[str]:
    """Return the Host headers that are answered."""
    everywhere = not _is_loopback(host) and _address(host) in {"0.0.0.0", "::"}
    if everywhere and not names:
        raise ValueError(
            f"--host {host}: expected --name as well, the name or address that browsers will ask "
            "for, since all others are refused"
        )
    own = ["["] if ":" in host else []  # all that Starlette reads of [::1]:8050
    return [*_WORDS_FOR_LOOPBACK, host, *own, *names]


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"--host {host} --port {port}: {reason}; --port 0 takes a free one"
        ) from error


def _greeting(root: Path, host: str, port: int) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"Runs below {root}: http://{shown}:{port}/ (it only reads; Ctrl-C ends it)"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(host: str) -> str:
    with suppress(ValueError):
        return str(ipaddress.ip_address(host))
    return host
