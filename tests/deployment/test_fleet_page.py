"""A node that is killed shows on the dashboard within ten seconds, idle or while it trains."""

import contextlib
import re
import shlex
import threading
import time

import pytest
from deployment_factories import NODES
from run_folders import write_run
from starlette.testclient import TestClient

from hafl_app.dashboard.app import dashboard
from hafl_app.deployment.deploy_local import TINY
from hafl_app.deployment.presence import FLEET_FILE

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]
PHONE, LAPTOP, _ = NODES
WITHIN_S = 10.0
QUIET_S = 8.0  # longer than an idle node is, which asks every three seconds


@pytest.fixture
def state_of(deployment, tmp_path):
    """Return what the page says of a node by name, as a reader sees it."""
    write_run(tmp_path / "outputs" / "run")
    file = deployment.logs / FLEET_FILE
    client = TestClient(dashboard(tmp_path / "outputs", ["testserver"], file))

    def state(name):
        text = client.get("/run?run=run").text
        row = re.search(rf"<td>{name}</td>.*?</tr>", text, re.DOTALL)
        return row and re.search(r'class="state (\w+)"', row.group()).group(1)

    return state


def seconds_until(state_of, name, wanted, most):
    started = time.monotonic()
    while state_of(name) != wanted:
        assert time.monotonic() - started < most, f"{name} is {state_of(name)}, expected {wanted}"
        time.sleep(0.2)
    return time.monotonic() - started


def test_an_idle_node_that_is_killed(deployment, state_of, record_property):
    node = deployment.start_node(PHONE, 0, len(NODES))
    deployment.wait_online(1)
    seconds_until(state_of, PHONE.name, "online", 60)
    end = time.monotonic() + QUIET_S
    while time.monotonic() < end:
        assert state_of(PHONE.name) == "online"
        time.sleep(0.5)
    node.kill()
    record_property("seconds", seconds_until(state_of, PHONE.name, "gone", WITHIN_S))


def test_a_node_that_is_killed_while_it_trains(deployment, state_of, record_property):
    node = deployment.start_node(LAPTOP, 0, 1)
    seconds_until(state_of, LAPTOP.name, "online", 60)
    overrides = (
        *TINY,
        *("dataset=synthetic", "dataset.num_train=160", "dataset.num_test=40"),
        *("federation.num_clients=1", "client.local_epochs=100000", "client.max_seconds=300"),
        f"output_dir={deployment.logs / 'run'}",
    )

    def run():
        with contextlib.suppress(Exception):  # it loses its only node
            deployment.run({"overrides": shlex.join(overrides)}, lambda line: None)

    threading.Thread(target=run, daemon=True).start()
    trains_for(deployment, QUIET_S)
    assert state_of(LAPTOP.name) == "online"
    node.kill()
    record_property("seconds", seconds_until(state_of, LAPTOP.name, "gone", WITHIN_S))


def trains_for(deployment, seconds):
    """Wait until the node has said nothing for so long: it trains."""
    from hafl_app.dashboard.folders import Root
    from hafl_app.dashboard.records import read_json

    root, end = Root(deployment.logs), time.monotonic() + 300
    while time.monotonic() < end:
        said = read_json(root, root.path / FLEET_FILE)
        (node,) = [node for node in said["nodes"] if node["name"] == LAPTOP.name]
        if node["last_call"] and said["written"] - node["last_call"] > seconds:
            return
        time.sleep(0.5)
    raise AssertionError("it never trained")
