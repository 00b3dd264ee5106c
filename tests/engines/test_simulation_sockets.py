"""Where the processes of a real simulation listen, and whom its Ray answers."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from running import TINY

from hafl_app.engines.flower_run import flwr_run, own_superlink, resources_for
from hafl_app.engines.processes import processes_of

ROOT = Path(__file__).parents[2]
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


def listening(token):
    """Return the listening sockets of a run's processes: name of the process, address, port."""
    found = set()
    for process in processes_of(token):
        try:
            name, connections = process.name(), process.net_connections("tcp")
        except psutil.Error:  # ended meanwhile
            continue
        found |= {(name, c.laddr.ip, c.laddr.port) for c in connections if c.status == "LISTEN"}
    return found


def call(port, environment):
    """Connect to a Ray as another program of this machine would; return the result."""
    result = subprocess.run(
        [sys.executable, "-c", _CALLER, f"127.0.0.1:{port}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_simulation_listens_on_the_loopback_and_needs_its_token(tmp_path):
    sockets, answers = set(), []

    def look(_line):
        nonlocal sockets
        now = listening(environment["HAFL_RUN_TOKEN"])
        sockets |= now
        ray = [port for name, _, port in now if name == "gcs_server"]
        if ray and not answers:
            stranger = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
            answers.extend(call(ray[0], env) for env in (environment, stranger))

    overrides = shlex.join((*TINY, f"output_dir={tmp_path / 'out'}"))
    with own_superlink(tmp_path / "log") as environment:
        flwr_run(ROOT, environment, {"overrides": overrides}, resources_for(5, 1, 0), look)

    assert {"gcs_server", "raylet"} <= {name for name, _, _ in sockets}
    assert any(name.startswith("flwr-simulation") for name, _, _ in sockets)
    assert {address for _, address, _ in sockets} <= LOOPBACK, sockets
    assert "let in" in answers[0]
    assert "refused" in answers[1]
