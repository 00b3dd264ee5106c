"""Runs on a real SuperLink, fence and three SuperNodes of ranks 2, 4 and 8."""

import json
import os
import shlex
import signal
import time

import pytest
import torch
from deployment_factories import NODES
from running import TINY, answering, records, run_tiny
from safetensors.torch import load_file

from hafl_app.engines.flower_run import FlowerRunError

THREE = ("federation.num_clients=3", "federation.alone_clients_per_rank=0")
pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def online(deployment):
    """All three nodes are online."""
    for partition_id, node in enumerate(NODES):
        deployment.start_node(node, partition_id, len(NODES))
    deployment.wait_online(len(NODES))
    return deployment


def run(deployment, folder, *overrides, on_line=lambda line: None):
    overrides = (*TINY, *THREE, *overrides, f"output_dir={folder}")
    deployment.run({"overrides": shlex.join(overrides)}, on_line)
    return json.loads((folder / "summary.json").read_text())


def wait_for(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def log_of(deployment, node):
    return (deployment.logs / f"{node.name}.log").read_text(errors="replace")


def restart(deployment, node, partition_id):
    """Start a node again until it is let in, as a device's service manager does."""
    while not comes_in(deployment, node, partition_id):
        time.sleep(5)  # for a minute Flower takes the killed one for alive


def comes_in(deployment, node, partition_id):
    before = len(log_of(deployment, node))
    process = deployment.start_node(node, partition_id, len(NODES))
    wait_for(lambda: process.poll() is not None or "Node ID" in log_of(deployment, node)[before:])
    return process.poll() is None


class TestThreeNodes:
    @pytest.fixture(scope="class")
    def finished(self, online, tmp_path_factory):
        folder = tmp_path_factory.mktemp("deployed") / "out"
        return folder, run(online, folder)

    def test_the_run_finishes_with_everybody(self, finished):
        folder, summary = finished
        assert summary["status"] == "finished"
        clients = records(folder, "client")
        assert [(c["partition_id"], c["rank"]) for c in clients] == [(0, 2), (1, 4), (2, 8)] * 2
        assert [c["error"] for c in clients] == [""] * 6
        up = {c["rank"]: c["bytes_up"] for c in clients}
        assert up[2] < up[4] < up[8]

    def test_it_gives_the_adapter_of_the_same_run_in_process(self, finished, tmp_path):
        folder, _ = finished
        run_tiny(tmp_path / "inprocess", *THREE)
        deployed, inprocess = (
            load_file(f / "adapter" / "adapter_model.safetensors")
            for f in (folder, tmp_path / "inprocess")
        )
        assert deployed.keys() == inprocess.keys()
        trained = [k for k in deployed if "lora_B" in k]
        assert all(deployed[k].abs().max() > 0 for k in trained)
        for name in deployed:
            torch.testing.assert_close(deployed[name], inprocess[name], rtol=0, atol=1e-5)

    def test_a_failed_run_is_told(self, online, tmp_path):
        with pytest.raises(FlowerRunError, match="finished:failed"):
            run(online, tmp_path / "out", "client.learning_rate=1e30", "client.max_grad_norm=0")


def test_a_node_killed_in_a_round_comes_back_and_answers_prompts_like_the_others(online, tmp_path):
    laptop, before = NODES[1], len(log_of(online, NODES[1]))
    killed = []

    def kill_and_restart(line):
        if "round 1/" in line and not killed:
            wait_for(lambda: "ROUND 2]" in log_of(online, laptop)[before:])  # its message is here
            os.kill(online.processes[laptop.name].pid, signal.SIGKILL)
            killed.append(online.processes[laptop.name].wait())
            restart(online, laptop, 1)

    settings = (*answering(tmp_path), "federation.num_rounds=4")
    summary = run(online, tmp_path / "out", *settings, on_line=kill_and_restart)

    assert killed == [-signal.SIGKILL]
    assert summary["status"] == "finished"
    replies = [r["replies"] for r in records(tmp_path / "out", "round")]
    assert replies[1:3] == [3, 2]
    assert replies[4] == 3
    answered = summary["client_generation"]["seen"]["by_client"]
    assert [(one["partition_id"], one["num_examples"]) for one in answered] == [
        (0, 2),
        (1, 2),
        (2, 2),
    ]
