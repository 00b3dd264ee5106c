"""Remains of a deployment, and of a node, after a kill -9."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from deployment_factories import NODES

from hafl_app.deployment.credentials import make_credentials
from hafl_app.deployment.own_folder import own_folder, remove_abandoned
from hafl_app.engines.processes import processes_of, run_environment, start_process

ROOT = Path(__file__).parents[2]


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Return the folder for temporary files of this test and of what it starts."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


_KILLED = """
import os, signal, sys
from pathlib import Path
from hafl_app.deployment.own_folder import own_folder
from hafl_app.engines.processes import run_environment, start_process
with own_folder() as made:
    start_process(["sleep", "600"], run_environment(made.path, made.token), Path(os.devnull))
    print(made.token, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def seen_within(seconds, happened):
    """Wait for something that another process does, on a machine of any load."""
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.05)
    return happened()


class TestAbandoned:
    def test_processes_and_folder_of_a_killed_one_go_at_the_next_start(self, temporary):
        killed = subprocess.run(
            [sys.executable, "-c", _KILLED],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(temporary)},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL
        token = killed.stdout.strip()
        assert len(processes_of(token)) == len(list(temporary.iterdir())) == 1

        assert remove_abandoned() == 1
        assert not processes_of(token)
        assert not list(temporary.iterdir())

    def test_one_that_is_going_on_stays_even_after_the_clock_was_set(self, temporary, monkeypatch):
        with own_folder() as made:
            environment = run_environment(made.path, made.token)
            start_process(["sleep", "600"], environment, Path(os.devnull))
            started = psutil.Process().create_time()
            monkeypatch.setattr(psutil.Process, "create_time", lambda self: started - 3600)
            assert remove_abandoned() == 0
            assert seen_within(5.0, lambda: len(processes_of(made.token)) == 1)
        assert not processes_of(made.token)
        assert not list(temporary.iterdir())

    def test_folders_of_others_stay(self, temporary):
        (temporary / "hafl-deployment-x").mkdir()
        (temporary / "hafl-deployment-y").mkdir()
        (temporary / "hafl-deployment-y" / "owner.json").write_text("[1]")
        assert remove_abandoned() == 0
        assert len(list(temporary.iterdir())) == 2


def test_credentials_can_be_made_without_leaving_the_key_of_the_authority(tmp_path):
    made = make_credentials(tmp_path / "set", [], ["phone"], days=1, keep_ca_key=False)
    assert sorted(p.name for p in made.folder.rglob("*.key")) == ["phone.key", "server.key"]


@pytest.mark.deploy
@pytest.mark.timeout(600)
def test_a_killed_deploy_local_has_no_ca_key_and_leaves_nothing_at_the_next_start(
    tmp_path, temporary
):
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "hafl_app.deployment", "--nodes", "1"),
            *("--output", str(tmp_path / "out")),
        ],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("Online:"):
            break
    assert list(temporary.rglob("server.key"))
    assert not list(temporary.rglob("ca.key"))
    process.kill()
    process.wait()

    assert remove_abandoned() == 2  # its keys and its Flower home
    assert not list(temporary.glob("hafl-*"))
    running = psutil.process_iter(["cmdline"])
    assert not [p for p in running if str(temporary) in " ".join(p.info["cmdline"] or ())]


@pytest.mark.deploy
@pytest.mark.timeout(600)
def test_the_executor_of_a_killed_supernode_goes_with_it(deployment):
    node = deployment.start_node(NODES[0], 0, len(NODES))
    deployment.wait_online(1)
    wait_until(lambda: psutil.Process(node.pid).children())
    executor = psutil.Process(node.pid).children()[0]
    assert "flower-superexec" in " ".join(executor.cmdline())

    node.kill()

    wait_until(lambda: not executor.is_running(), seconds=5)
