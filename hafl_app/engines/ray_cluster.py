"""Simulation on an existing Ray cluster instead of a Ray started for the run."""

import json
import re
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path

from hafl_app.client.permissions import OWN_MACHINE
from hafl_app.client.warm_worker.ray_runtime import GUARDED
from hafl_app.engines.app_folder import copy_code

ADDRESS = "RAY_ADDRESS"
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # its real name; `ray job submit` sets it, too
NICENESS = "RAY_worker_niceness"  # added to that of the process that starts Ray
_CONNECT_SECONDS = 5.0


class RayClusterError(RuntimeError):
    """A Ray cluster that a run cannot use; the message is one line."""


def cluster_address(setting: str | None, environ: Mapping[str, str]) -> str | None:
    """Return the cluster to simulate on; None for a Ray of the run's own.

    Parameters
    ----------
    setting
        ``federation.ray_address``; it takes precedence over ``RAY_ADDRESS``.
    environ
        The environment. ``RAY_ADDRESS=local`` is Ray's own word for no cluster.

    Raises
    ------
    RayClusterError
        If the address is not host:port, or if nothing answers there.
    """
    name = "federation.ray_address" if setting else ADDRESS
    address = setting or environ.get(ADDRESS, "")
    if address in ("", "local"):
        return None
    # Also rejects Ray's "auto", which may find another user's Ray, and its remote client ray://.
    match = re.fullmatch(r"(?P<host>[\w.-]+|\[[\da-fA-F:]+\]):(?P<port>\d{1,5})", address)
    if match is None:
        raise RayClusterError(f"{name}={address!r}: expected host:port, as `ray start` prints it")
    try:
        at = (match["host"].strip("[]"), int(match["port"]))
        socket.create_connection(at, _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RayClusterError(f"{name}={address}: no Ray answers there ({reason})") from error
    return address


def check_shares(client_cpus: int | None, client_gpus: float | None) -> None:
    """Check that the shares of one client are given: a cluster's machines cannot be inspected here.

    Raises
    ------
    RayClusterError
        If a share is not given.
    """
    shares = {"federation.client_cpus": client_cpus, "federation.client_gpus": client_gpus}
    for name, share in shares.items():
        if share is None:
            raise RayClusterError(
                f"{name}: must be given on a Ray cluster, the share of one client (no GPU: 0)"
            )


def ray_environment(
    address: str | None, folder: Path, environ: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment that points Flower's Ray backend to a cluster, or away from one.

    A Ray of the run's own listens on the loopback alone and answers only the run: whoever can
    connect to a Ray can run code in it. Its workers are as nice as this process, not 15 as Ray has
    it: beside other programs clients would take three times as long.

    Workers of a cluster are started by their machine's Ray and inherit nothing from the run. The
    job carries this app's code and settings, so that every machine runs the same version, and the
    permissions of simulated nodes (see `permissions`).

    Parameters
    ----------
    address
        From `cluster_address`; None for a Ray of the run's own.
    folder
        Receives a copy of the code for Ray; only for a cluster, and needed until the run has begun.
    environ
        The run's own environment, with its permissions.
    """
    if address is None:
        # A token in the environment goes before any file that the user may have named.
        own = {ADDRESS: "local", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        return GUARDED | own | {NICENESS: environ.get(NICENESS) or "0"}
    copy_code(folder)
    permissions = {name: environ[name] for name in OWN_MACHINE}
    runtime = {"working_dir": str(folder), "env_vars": permissions}
    return {ADDRESS: address, JOB_CONFIG: json.dumps({"runtime_env": runtime})}
