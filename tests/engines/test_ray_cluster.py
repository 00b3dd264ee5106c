"""Simulations on a Ray cluster of two machines, here two addresses of the loopback interface."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from running import TINY, records

from hafl_app.client.permissions import OWN_MACHINE
from hafl_app.config.compose import SettingsError
from hafl_app.engines.one_run import run_once
from hafl_app.engines.processes import run_environment
from hafl_app.engines.ray_cluster import (
    RayClusterError,
    check_shares,
    cluster_address,
    ray_environment,
)

ROOT = Path(__file__).parents[2]
HEAD, WORKER = "127.0.0.2", "127.0.0.3"


class TestAddress:
    @pytest.fixture
    def listening(self):
        with socket.create_server((HEAD, 0)) as server:
            yield f"{HEAD}:{server.getsockname()[1]}"

    def test_none_means_a_ray_of_the_runs_own(self):
        assert cluster_address(None, {}) is None
        assert cluster_address(None, {"RAY_ADDRESS": "local"}) is None

    def test_the_setting_goes_before_the_environment(self, listening):
        assert cluster_address(listening, {"RAY_ADDRESS": "127.0.0.9:1"}) == listening
        assert cluster_address(None, {"RAY_ADDRESS": listening}) == listening

    @pytest.mark.parametrize("address", ["auto", "ray://head:10001", "head", "head:port", ":6379"])
    def test_other_than_host_and_port_is_refused(self, address):
        with pytest.raises(RayClusterError, match=r"^RAY_ADDRESS='.*': expected host:port"):
            cluster_address(None, {"RAY_ADDRESS": address})

    def test_without_an_answer_the_run_is_refused(self):
        with pytest.raises(RayClusterError, match=r"^federation.ray_address=127.0.0.2:9: no Ray"):
            cluster_address("127.0.0.2:9", {})
        with pytest.raises(RayClusterError, match="no Ray answers"):
            cluster_address("127.0.0.2:99999", {})


@pytest.mark.parametrize(
    ("cpus", "gpus", "missing"), [(None, 0.0, "client_cpus"), (2, None, "client_gpus")]
)
def test_shares_are_not_guessed(cpus, gpus, missing):
    check_shares(2, 0.0)
    with pytest.raises(RayClusterError, match=f"^federation.{missing}: must be given"):
        check_shares(cpus, gpus)


class TestEnvironment:
    def test_without_a_cluster_a_foreign_ray_is_never_met(self, tmp_path):
        assert ray_environment(None, tmp_path / "code", {})["RAY_ADDRESS"] == "local"
        assert not (tmp_path / "code").exists()

    def test_a_ray_of_ones_own_keeps_to_the_loopback_and_to_its_token(self, tmp_path):
        one, other = (ray_environment(None, tmp_path, {}) for _ in range(2))
        assert one["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
        assert one["RAY_AUTH_MODE"] == "token"
        assert len(one["RAY_AUTH_TOKEN"]) == 64
        assert one["RAY_AUTH_TOKEN"] != other["RAY_AUTH_TOKEN"]

    def test_workers_of_ones_own_ray_are_as_nice_as_the_run_unless_its_user_says_otherwise(
        self, tmp_path
    ):
        given = {"RAY_worker_niceness": "7"}

        assert ray_environment(None, tmp_path, {})["RAY_worker_niceness"] == "0"
        assert ray_environment(None, tmp_path, given)["RAY_worker_niceness"] == "7"

    def test_a_cluster_keeps_its_own_way_to_let_in(self, tmp_path, monkeypatch):
        run = run_environment(tmp_path, "token")
        assert not [n for n in ray_environment("head:1", tmp_path / "c", run) if "AUTH" in n]

    def test_code_settings_and_permissions_travel_with_the_job(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HAFL_ALLOWED_PATHS", "/data")
        run = run_environment(tmp_path, "token")

        environment = ray_environment("head:6379", tmp_path / "code", run)

        assert environment["RAY_ADDRESS"] == "head:6379"
        runtime = json.loads(environment["RAY_JOB_CONFIG_JSON_ENV_VAR"])["runtime_env"]
        assert runtime["env_vars"] == OWN_MACHINE | {"HAFL_ALLOWED_PATHS": "/data"}
        code = Path(runtime["working_dir"])
        assert (code / "hafl_app" / "client_app.py").is_file()
        assert (code / "conf" / "config.yaml").is_file()
        assert not list(code.rglob("__pycache__"))


class RayNode:
    """One `ray start`, with a folder, a process group and an address of its own."""

    def __init__(self, address: str, environment: dict[str, str], *arguments: str) -> None:
        # Not pytest's folder: paths of sockets are limited to 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="hafl-ray-"))
        self.process = subprocess.Popen(
            [
                *(Path(sys.executable).parent / "ray", "start", "--block"),
                *("--node-ip-address", address, "--num-cpus", "1", "--disable-usage-stats"),
                *("--temp-dir", self.folder, "--object-store-memory", "100000000", *arguments),
            ],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def processes(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        return []

    def actors(self) -> list[psutil.Process]:
        return [p for p in self.processes() if "ClientAppActor" in " ".join(p.cmdline())]

    def wait_for_raylet(self) -> None:
        deadline = time.monotonic() + 90
        while not any(p.name() == "raylet" for p in self.processes()):
            assert self.process.poll() is None, "`ray start` ended"
            assert time.monotonic() < deadline, "no raylet"
            time.sleep(0.2)

    def worker_logs(self) -> str:
        return "".join(file.read_text() for file in self.folder.glob("session_2*/logs/worker-*"))

    def stop(self) -> None:
        """Stop this Ray and no other: `ray stop` would stop every one of the machine."""
        left = self.processes()
        for stop in (signal.SIGTERM, signal.SIGKILL):
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(stop)
            _, left = psutil.wait_procs(left, timeout=15)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def ray_cluster():
    """Start two nodes that answer no one without the token; yield address, nodes, environment."""
    with socket.create_server((HEAD, 0)) as probe:
        address = f"{HEAD}:{probe.getsockname()[1]}"
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    port = address.rpartition(":")[2]
    nodes = []
    try:
        head = ("--head", "--port", port, "--include-dashboard", "false")
        nodes.append(RayNode(HEAD, environment, *head))
        nodes[0].wait_for_raylet()
        nodes.append(RayNode(WORKER, environment, "--address", address))
        nodes[1].wait_for_raylet()
        yield address, nodes, environment
    finally:
        for node in reversed(nodes):
            node.stop()


def write_data(folder: Path) -> Path:
    """Write a file that only a node with permission reads."""
    rows = [f"{'red' if i % 3 else 'blue'} item number {i},{'ab'[i % 2]}" for i in range(90)]
    file = folder / "data.csv"
    file.write_text("\n".join(["text,label", *rows]))
    return file


def simulate(folder: Path, environment: dict[str, str], *arguments: str):
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "simulate.py", *arguments, f"output_dir={folder}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=folder.parent,
    )


def test_an_engine_without_ray_does_not_pretend_to_use_a_cluster(tmp_path):
    cluster = ("federation.ray_address=127.0.0.2:6379", "engine=inprocess")
    with pytest.raises(SettingsError, match="ray_address: engine=inprocess uses no Ray"):
        run_once([*TINY, *cluster], tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run on both nodes; what was alive and logged after it."""
    folder = tmp_path_factory.mktemp("cluster")
    data = ("dataset=local", f"dataset.path={write_data(folder)}")
    with ray_cluster() as (address, nodes, environment):
        shares = ("federation.client_cpus=1", "federation.client_gpus=0")
        result = simulate(
            folder / "out",
            environment,
            *(*TINY, *data, *shares, f"federation.ray_address={address}"),
        )
        after = [(n.process.poll(), len(n.actors()), n.worker_logs()) for n in nodes]
    alone = simulate(folder / "alone", dict(os.environ), *TINY, *data, "engine=inprocess")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    return folder, result, after


@pytest.mark.deploy
@pytest.mark.timeout(600)
class TestTwoNodes:
    def test_it_finishes(self, run):
        _, result, _ = run
        assert result.returncode == 0, result.stdout + result.stderr

    def test_clients_train_on_both_nodes(self, run):
        _, _, after = run
        assert [log.count("loading the base model") for _, _, log in after] == [1, 1]

    def test_the_numbers_are_those_of_a_run_without_it(self, run):
        folder, _, _ = run
        for kind in ("round", "client"):
            cluster, alone = records(folder / "out", kind), records(folder / "alone", kind)
            for line in (*cluster, *alone):
                line.pop("node_id", None)  # random under Flower
            assert cluster == alone
            assert cluster

    def test_the_cluster_is_left_as_it_was(self, run):
        _, _, after = run
        assert [(ended, actors) for ended, actors, _ in after] == [(None, 0), (None, 0)]
