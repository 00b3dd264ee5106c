"""The warm worker on a real Ray, asked as Flower asks: from a new process for every message."""

import csv
import json
import os
import pickle
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from flwr.app import ConfigRecord
from running import TINY

from hafl_app.client.warm_worker import ray_runtime
from hafl_app.engines.processes import free_port
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.run import build
from hafl_app.training.lora_model import adapter_shapes
from hafl_app.wire.records import AdapterArrays, adapter_content, plan_record

pytestmark = pytest.mark.deploy

ROOT, HELPERS = Path(__file__).parents[2], Path(__file__).parents[1] / "helpers"
RANK = 3


def train_content(head="averaged", epochs=1):
    settings = build.settings_of_run({"overrides": shlex.join(TINY)})
    shapes = adapter_shapes(build.model_spec(settings, 20))
    rng = np.random.default_rng(0)
    modules = {
        name: (
            rng.normal(size=(RANK, shape.in_features)).astype(np.float32),
            rng.normal(size=(shape.out_features, RANK)).astype(np.float32) * 0.1,
        )
        for name, shape in shapes.items()
    }
    plan = TrainPlan(
        {name: ModulePlan((0, 1, 2), (0, 2)) for name in shapes}, head=head, local_epochs=epochs
    )
    records = {"plan": plan_record(plan), "config": ConfigRecord({"server-round": 1})}
    return adapter_content(AdapterArrays(modules), **records)


def arrays(reply):
    """Return the bytes of every array of a reply."""
    found = reply["content"].array_records
    return {(r, name): array.data for r, record in found.items() for name, array in record.items()}


class Node:
    """A SuperNode's processes, one for each message."""

    def __init__(self, app_folder: Path, folder: Path, port: int) -> None:
        self.app_folder, self.folder, self.port = app_folder, folder, port
        self.log = ""

    def run(self, *request, **environment):
        file = self.folder / "request"
        file.write_bytes(pickle.dumps(request))
        result = subprocess.run(
            [sys.executable, str(HELPERS / "asking.py"), str(self.app_folder), str(file)],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        self.log = result.stderr
        if result.returncode:
            raise RuntimeError(result.stderr.strip())
        return pickle.loads(file.read_bytes())  # noqa: S301  written by our own program

    def ask(self, kind="query", content=None, *, node_id=7, run_id=1, worker=True, **config):
        environment = {k: v for k, v in config.items() if k.startswith("HAFL")}
        config = {k.replace("_", "-"): v for k, v in config.items() if k not in environment}
        config.setdefault("overrides", shlex.join(TINY))
        if worker:
            config.setdefault("worker", f"127.0.0.1:{self.port}")
        return self.run("ask", kind, content, config, run_id, node_id, **environment)

    def workers(self):
        return self.run("report", self.port)


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Start a Ray for this file's tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAFL_NODE_STATE", str(tmp_path_factory.mktemp("state")))
        temp_dir = Path(tempfile.mkdtemp(prefix="hafl-", dir="/tmp"))
        number = free_port()
        ray_runtime.start(number, num_gpus=0, temp_dir=temp_dir)
        try:
            yield number
        finally:
            assert ray_runtime.stop(number)
            assert not temp_dir.exists()


@pytest.fixture(scope="module")
def app_folder(tmp_path_factory):
    """Return a copy of the app, which is not edited meanwhile."""
    folder = tmp_path_factory.mktemp("app")
    for name in ("hafl_app", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def node(port, app_folder, tmp_path):
    return Node(app_folder, tmp_path, port)


@pytest.fixture
def node_id():
    """Return a node id of this test alone, and with it a worker."""
    return random.randrange(10**9)


def report(node, node_id):
    (found,) = [r for name, r in node.workers().items() if name.startswith(f"node-{node_id}/")]
    return found


def test_every_port_is_on_the_loopback(node, node_id):
    node.ask(node_id=node_id)  # with a worker, which listens too
    leader = psutil.Process(ray_runtime.running(node.port).pid)
    addresses = {
        connection.laddr.ip
        for process in (leader, *leader.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }

    assert addresses
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_only_who_has_the_token_is_answered(node):
    program = f"import ray; ray.init('127.0.0.1:{node.port}')"
    own_token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    environment = os.environ | ray_runtime.connection_environment(node.port) | own_token
    del environment["RAY_AUTH_TOKEN_PATH"]

    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=False
    )

    assert result.returncode != 0
    assert b"uthenticat" in result.stderr
    token = ray_runtime.state_folder(node.port) / "token"
    assert token.stat().st_mode & 0o077 == 0


def test_the_model_is_loaded_once_for_all_messages_of_a_run(node, node_id):
    for _ in range(2):
        assert node.ask("train", train_content(), node_id=node_id)["heavy"] == []
    node.ask("evaluate", train_content(), node_id=node_id)

    assert report(node, node_id) | {"pid": 0} == {"pid": 0, "messages": 3, "models_loaded": 1}


def test_the_adapter_is_the_same_with_and_without_a_worker_bit_for_bit(node, node_id):
    there = node.ask("train", train_content(), node_id=node_id)
    again = node.ask("train", train_content(), node_id=node_id)
    here = node.ask("train", train_content(), node_id=node_id, worker=False)

    assert there["heavy"] == []
    assert "torch" in here["heavy"]
    assert arrays(there) == arrays(here)
    assert arrays(again) == arrays(here)


def test_what_the_node_keeps_comes_back(node, node_id):
    reply = node.ask("train", train_content(head="local"), node_id=node_id)

    assert reply["state"].array_records["local-head"]


def test_a_worker_that_was_killed_is_started_again(node, node_id):
    node.ask(node_id=node_id)
    before = report(node, node_id)["pid"]
    os.kill(before, signal.SIGKILL)

    assert node.ask(node_id=node_id)["content"]
    assert report(node, node_id)["pid"] != before


def test_one_that_is_killed_while_it_trains_is_started_again(node, node_id):
    node.ask("train", train_content(), node_id=node_id)
    before = psutil.Process(report(node, node_id)["pid"])
    spent = before.cpu_times().user

    with ThreadPoolExecutor() as pool:
        asked = pool.submit(node.ask, "train", train_content(epochs=400), node_id=node_id)
        while before.cpu_times().user < spent + 0.5:  # it trains
            time.sleep(0.05)
        before.kill()
        reply = asked.result()

    assert reply["content"]
    assert "died" in node.log
    assert report(node, node_id)["messages"] == 1


def test_nodes_share_a_worker_only_if_they_are_told_to(node, node_id):
    for number in (node_id, node_id + 1):
        node.ask(node_id=number)
        node.ask(node_id=number, worker_name="together")

    names = node.workers()
    assert {f"node-{node_id}", f"node-{node_id + 1}"} <= {n.partition("/")[0] for n in names}
    (shared,) = [r for name, r in names.items() if name.startswith("together/")]
    assert shared["messages"] == 2


def test_a_worker_without_messages_ends(node, node_id):
    node.ask(node_id=node_id, worker_idle_s=1)
    deadline = time.monotonic() + 30
    while any(name.startswith(f"node-{node_id}/") for name in node.workers()):
        assert time.monotonic() < deadline


def test_other_code_gets_a_worker_of_its_own_and_the_older_one_ends(node, node_id, app_folder):
    node.ask(node_id=node_id)
    before = report(node, node_id)["pid"]
    newer = node.folder / "newer"
    shutil.copytree(app_folder, newer)
    with (newer / "hafl_app" / "plan.py").open("a") as file:
        file.write("# newer\n")

    Node(newer, node.folder, node.port).ask(node_id=node_id)

    psutil.wait_procs([psutil.Process(before)] if psutil.pid_exists(before) else [], timeout=20)
    assert not psutil.pid_exists(before)
    assert report(node, node_id)["messages"] == 1


def test_a_node_permits_the_same_as_in_its_own_process(node, node_id):
    data = node.folder / "train.csv"
    with data.open("w", newline="") as file:
        rows = [[f"{label} is number {i}", label] for i in range(50) for label in "ab"]
        csv.writer(file).writerows([["text", "label"], *rows])
    overrides = shlex.join([*TINY, "dataset=local", f"dataset.path={data}"])

    def ask(**more):
        return node.ask(node_id=node_id, overrides=overrides, **more)

    for worker in (True, False):
        assert "allowed-paths" in ask(worker=worker)["error"]
        assert ask(worker=worker, HAFL_ALLOWED_PATHS=str(data.parent))["content"]
        assert ask(worker=worker, allowed_paths=str(data.parent))["content"]
        assert "allowed-paths" in ask(worker=worker)["error"]  # what was said before is forgotten


def test_an_error_that_nobody_foresaw_is_the_one_that_it_is_in_process(node, node_id):
    ended = []
    for worker in (True, False):
        with pytest.raises(RuntimeError) as caught:
            node.ask("train", train_content(), node_id=node_id, worker=worker, partition_id="x")
        ended.append(str(caught.value).splitlines()[-1])

    assert ended[0] == ended[1]
    assert ended[0].startswith("ValueError: ")


def test_without_ray_a_node_answers_by_itself_and_says_so_once(node):
    alone = Node(node.app_folder, node.folder, free_port())

    reply = alone.ask()

    assert reply["content"]
    assert "torch" in reply["heavy"]
    assert alone.log.count("no Ray of this node") == 1


def test_more_gpus_than_there_are_is_told(node, node_id):
    reply = node.ask(node_id=node_id, worker_gpus=2)

    assert reply["error"] == "worker-gpus=2 of this node: its Ray has 0 GPUs"


def test_the_program_tells_what_runs(node, port):
    def program(*arguments):
        return subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "node_worker.py"), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )

    told = program("status", "--port", str(port))
    taken = program("start", "--port", str(port))
    nothing = program("stop", "--port", str(free_port()))

    known = json.loads((ray_runtime.state_folder(port) / "ray.json").read_text())
    assert f"pid {known['pid']}" in told.stdout
    assert (taken.returncode, nothing.returncode) == (1, 1)
    assert taken.stderr.startswith("error: a Ray of this node runs on port")
    assert len(taken.stderr.splitlines()) == len(nothing.stderr.splitlines()) == 1
    assert ray_runtime.running(port)
