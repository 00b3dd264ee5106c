"""The app under `flwr run` on Ray: same numbers as in process, failures said, nothing left."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from running import LONE, TINY, records, run_tiny

from hafl_app.engines import flower_run
from hafl_app.run.run_lock import RunLockedError, run_lock

ROOT = Path(__file__).parents[1]
MARK, MARKED = "HAFL_APP_TESTS_OF", str(os.getpid())
pytestmark = pytest.mark.slow


def command(*arguments):
    return [sys.executable, str(ROOT / "scripts" / "simulate.py"), *TINY, *arguments]


@pytest.fixture(scope="module", autouse=True)
def mark():
    """Mark all that is started here: other tests may run Flower and Ray meanwhile."""
    os.environ[MARK] = MARKED
    yield
    del os.environ[MARK]


def flower_processes():
    """Processes of SuperLinks, Ray and Flower that these tests have started and that are alive."""
    names = ("flower-superlink", "raylet", "gcs_server", "flwr-simulation", "ClientAppActor")
    found = set()
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        with contextlib.suppress(psutil.Error):
            if any(name in line for name in names) and process.environ().get(MARK) == MARKED:
                found.add(process.info["pid"])
    return found


def homes_of(pids):
    """The Flower homes of processes that were started for a run."""
    homes = set()
    for pid in pids:
        with contextlib.suppress(psutil.Error, KeyError):
            homes.add(Path(psutil.Process(pid).environ()["FLWR_HOME"]))
    return homes


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray") / "out"
    before = flower_processes()
    result = subprocess.run(
        command(f"output_dir={folder}"),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=tmp_path_factory.mktemp("cwd"),
    )
    return folder, result, flower_processes() - before


class TestRun:
    def test_it_finishes_and_streams_its_log(self, on_ray):
        folder, result, _ = on_ray
        assert result.returncode == 0, result.stdout + result.stderr
        assert "round 2/2" in result.stdout
        assert "training, rank 2" in result.stdout
        assert json.loads((folder / "summary.json").read_text())["status"] == "finished"

    def test_nothing_is_left_running(self, on_ray):
        _, _, left = on_ray
        assert not left

    def test_same_numbers_as_in_process(self, on_ray, tmp_path):
        folder, _, _ = on_ray
        run_tiny(tmp_path / "inprocess", LONE)
        for kind in ("round", "client"):
            ray, inprocess = records(folder, kind), records(tmp_path / "inprocess", kind)
            for line in (*ray, *inprocess):
                line.pop("node_id", None)  # random under Flower
            assert ray == inprocess

    def test_a_worker_loads_the_base_model_once(self, on_ray):
        folder, _, _ = on_ray
        log = (folder / "flower.log").read_text()
        # One process serves, two at most train: 5 clients, 2 rounds, evaluations, lone clients.
        assert 1 <= log.count("loading the base model") <= 1 + (os.cpu_count() or 1)


def test_a_failed_run_exits_non_zero(tmp_path):
    result = subprocess.run(
        command("client.learning_rate=1e30", "client.max_grad_norm=0", f"output_dir={tmp_path}"),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 1
    assert "finished:failed" in result.stderr
    assert "0 of 5 clients count" in result.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    before = flower_processes()
    # Under a shell's background job SIGINT is ignored, and children would inherit that.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command("federation.num_rounds=500", f"output_dir={tmp_path}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, inherited)
    deadline = time.monotonic() + 150
    for line in process.stdout:
        if "  1/500" in line or time.monotonic() > deadline:
            break
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    process.stdout.read()
    assert process.wait(timeout=60) == 130
    assert not flower_processes() - before


def test_a_killed_run_is_stopped_and_goes_on(tmp_path):
    before = flower_processes()
    with subprocess.Popen(
        command("federation.num_rounds=500", f"output_dir={tmp_path / 'out'}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        for line in process.stdout:
            if "  2/500" in line:
                break
        process.kill()
    left = flower_processes() - before
    assert left  # nobody could stop them
    homes = homes_of(left)
    assert homes

    newest = max((tmp_path / "out" / "checkpoints").glob("round-*"))
    rounds = int(newest.stem.removeprefix("round-")) + 80  # it went on meanwhile
    result = subprocess.run(
        [
            *(sys.executable, str(ROOT / "scripts" / "simulate.py")),
            *(f"resume={tmp_path / 'out'}", f"federation.num_rounds={rounds}"),
            "engine=inprocess",  # as the rounds that went on are many
        ],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=tmp_path,
    )

    assert result.returncode == 0, result.stdout + result.stderr
    assert "stopped what the killed run had left behind" in result.stdout
    assert not any(home.exists() for home in homes)
    told = [r["server_round"] for r in records(tmp_path / "out", "round")]
    assert told == list(range(rounds + 1))
    assert not flower_processes() - before


def test_a_run_that_is_going_on_is_left_alone(tmp_path):
    run_tiny(tmp_path / "out")

    with run_lock(tmp_path / "out"), pytest.raises(RunLockedError, match=f"process {os.getpid()}"):
        run_tiny(tmp_path / "out", "federation.num_rounds=3", f"resume={tmp_path / 'out'}")


class TestOwnSuperlink:
    def test_a_command_that_fails_inside_leaves_nothing(self, tmp_path):
        before = flower_processes()
        with (
            pytest.raises(flower_run.FlowerRunError, match="started no run"),
            flower_run.own_superlink(tmp_path / "log") as environment,
        ):
            home = Path(environment["FLWR_HOME"])
            assert flower_processes() - before
            flower_run.flwr_run(
                tmp_path / "no-app",
                environment,
                {},
                flower_run.SimulationResources(1, 1, 0.0),
                lambda line: None,
            )
        assert not flower_processes() - before
        assert not home.exists()
