"""The app under `flwr run` on Ray: same numbers as in process, failures said, nothing left."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from listening import LOOPBACK, call_ray, listening, stranger
from running import LONE, TINY, answering, records, run_tiny

from hafl_app.cgroups import usable_cpus
from hafl_app.engines import flower_run
from hafl_app.engines.processes import processes_of
from hafl_app.run.run_lock import RunLockedError, run_lock

ROOT = Path(__file__).parents[1]
MARK, MARKED = "HAFL_APP_TESTS_OF", str(os.getpid())
# More than half of the processors for a client: one process trains, which is started sooner.
ONE_AT_ONCE = f"federation.client_cpus={usable_cpus() // 2 + 1}"
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


def environment_of(pids):
    """Return the environment that a run gives its processes; empty if none of them has it yet."""
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            if "HAFL_RUN_TOKEN" in (found := psutil.Process(pid).environ()):
                return found
    return {}


def homes_of(pids):
    """The Flower homes of processes that were started for a run."""
    homes = set()
    for pid in pids:
        with contextlib.suppress(psutil.Error, KeyError):
            homes.add(Path(psutil.Process(pid).environ()["FLWR_HOME"]))
    return homes


def newest_round(folder):
    return max(int(file.stem.removeprefix("round-")) for file in folder.glob("checkpoints/round-*"))


def wait_for_round_after(server_round, folder):
    """Wait for a later checkpoint, which says that the run goes on."""
    deadline = time.monotonic() + 60
    while (newest := newest_round(folder)) <= server_round and time.monotonic() < deadline:
        time.sleep(0.05)
    assert newest > server_round


def hold(pids):
    """Suspend the processes that train; the server waits for them, and its lock stays."""
    workers = [p for p in map(psutil.Process, pids) if "ray::" in " ".join(p.cmdline())]
    assert workers
    for process in workers:
        process.suspend()


@dataclass
class RayRun:
    """A whole run on Ray: what it said and left, and what was seen of it meanwhile."""

    folder: Path
    returncode: int = -1
    log: str = ""
    left: set[int] = field(default_factory=set)
    sockets: set[tuple[str, str, int]] = field(default_factory=set)
    answers: list[str] = field(default_factory=list)

    def look(self, pids):
        """Note where its processes listen; once Ray is up, call it from within and without."""
        inside = environment_of(pids)
        now = listening(processes_of(inside["HAFL_RUN_TOKEN"])) if inside else set()
        self.sockets |= now
        ray = [port for name, _, port in now if name == "gcs_server"]
        if ray and not self.answers:
            self.answers += [call_ray(ray[0], inside), call_ray(ray[0], stranger())]


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """Settings of a language model: its clients exchange what others do, and write answers."""
    return answering(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory, language):
    run = RayRun(tmp_path_factory.mktemp("ray") / "out")
    before = flower_processes()
    with subprocess.Popen(
        command(*language, f"output_dir={run.folder}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path_factory.mktemp("cwd"),
    ) as process:
        limit = threading.Timer(280, process.terminate)
        limit.start()
        for line in process.stdout:
            run.log += line
            run.look(flower_processes() - before)
        limit.cancel()
    run.returncode, run.left = process.returncode, flower_processes() - before
    return run


class TestRun:
    def test_it_finishes_and_streams_its_log(self, on_ray):
        assert on_ray.returncode == 0, on_ray.log
        assert "round 2/2" in on_ray.log
        assert "training, rank 2" in on_ray.log
        assert json.loads((on_ray.folder / "summary.json").read_text())["status"] == "finished"

    def test_nothing_is_left_running(self, on_ray):
        assert not on_ray.left

    def test_it_listens_on_the_loopback_alone(self, on_ray):
        names = {name for name, _, _ in on_ray.sockets}
        assert {"gcs_server", "raylet"} <= names
        assert any(name.startswith("flwr-simulation") for name in names)
        assert {address for _, address, _ in on_ray.sockets} <= LOOPBACK, on_ray.sockets

    def test_its_ray_needs_its_token(self, on_ray):
        inside, outside = on_ray.answers
        assert "let in" in inside
        assert "refused" in outside

    def test_same_numbers_as_in_process(self, on_ray, language, tmp_path):
        alone = run_tiny(tmp_path / "inprocess", *language, LONE)
        for kind in ("round", "client"):
            ray, inprocess = records(on_ray.folder, kind), records(tmp_path / "inprocess", kind)
            for line in (*ray, *inprocess):
                line.pop("node_id", None)  # random under Flower
            assert ray == inprocess
        answers = json.loads((on_ray.folder / "summary.json").read_text())["client_generation"]
        assert answers == alone["client_generation"]
        assert answers["seen"]["num_examples"] == 5 * 2

    def test_a_worker_loads_the_base_model_once(self, on_ray):
        log = (on_ray.folder / "flower.log").read_text()
        # One process serves, two at most train: 5 clients, 2 rounds, evaluations, lone clients.
        assert 1 <= log.count("loading the base model") <= 1 + (os.cpu_count() or 1)


def test_a_failed_run_exits_non_zero(tmp_path):
    result = subprocess.run(
        command(
            *(ONE_AT_ONCE, "client.learning_rate=1e30", "client.max_grad_norm=0"),
            f"output_dir={tmp_path}",
        ),
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
            command(ONE_AT_ONCE, "federation.num_rounds=500", f"output_dir={tmp_path}"),
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
        command(ONE_AT_ONCE, "federation.num_rounds=500", f"output_dir={tmp_path / 'out'}"),
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

    wait_for_round_after(newest_round(tmp_path / "out"), tmp_path / "out")
    hold(left)  # or it would be some 80 rounds ahead when the next command has started
    rounds = newest_round(tmp_path / "out") + 2
    result = subprocess.run(
        [
            *(sys.executable, str(ROOT / "scripts" / "simulate.py")),
            *(f"resume={tmp_path / 'out'}", f"federation.num_rounds={rounds}"),
            "engine=inprocess",
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
