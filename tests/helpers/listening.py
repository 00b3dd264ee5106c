"""Where the processes of a run listen, and whom its Ray answers."""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping

import psutil

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
_CALLER = """
import sys
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5)
except Exception as error:
    sys.exit(f"refused: {error}")
print("let in")
"""


def listening(processes: Iterable[psutil.Process]) -> set[tuple[str, str, int]]:
    """Return the processes' listening sockets: name of the process, address, port."""
    found = set()
    for process in processes:
        try:
            name, connections = process.name(), process.net_connections("tcp")
        except psutil.Error:  # ended meanwhile
            continue
        found |= {(name, c.laddr.ip, c.laddr.port) for c in connections if c.status == "LISTEN"}
    return found


def call_ray(port: int, environment: Mapping[str, str]) -> str:
    """Connect to a Ray as another program of this machine would; return what came of it."""
    result = subprocess.run(
        [sys.executable, "-c", _CALLER, f"127.0.0.1:{port}"],
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return result.stdout + result.stderr


def stranger() -> dict[str, str]:
    """Return the environment of a program that no Ray has let in."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
