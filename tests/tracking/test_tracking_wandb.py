import io
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hafl_app.tracking.base import TrackingError
from hafl_app.tracking.wandb import WandbTracker

# Run by an interpreter of its own on a pseudo-terminal, where wandb would ask for a key.
ONLINE = """
import sys
from pathlib import Path
from hafl_app.tracking.base import TrackingError
from hafl_app.tracking.wandb import WandbTracker
try:
    WandbTracker("hafl", None, "online", Path("runs"), "run").start({}, [])
except TrackingError as error:
    sys.exit(str(error))
"""


class FakeRun:
    """Stands in for a wandb run; a step is merged, as in wandb, until a later one comes."""

    def __init__(self):
        self.steps = {}
        self.summary = {}
        self.exit_code = None

    def log(self, values, step):
        assert step >= max(self.steps, default=0), "wandb drops steps that go back"
        self.steps.setdefault(step, {}).update(values)

    def finish(self, exit_code):
        self.exit_code = exit_code


class FakeWandb:
    """The part of the wandb module that `WandbTracker` uses."""

    class UsageError(Exception):
        pass

    class AuthenticationError(Exception):
        pass

    errors = SimpleNamespace(UsageError=UsageError, AuthenticationError=AuthenticationError)
    Settings = dict

    def __init__(self):
        self.run = FakeRun()
        self.error = None
        self.asked = None
        self.could_prompt = None

    def init(self, **asked):
        self.asked = asked
        self.could_prompt = sys.stdin.isatty()
        if self.error:
            raise self.error
        return self.run


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def tracker(tmp_path):
    return WandbTracker("hafl", "team", "online", tmp_path / "run", "flexlora-3")


class TestStart:
    def test_opens_one_run_with_the_settings(self, wandb, tracker, tmp_path, client_rows):
        tracker.start({"seed": 3, "lora": {"max_rank": 16}}, client_rows)

        asked = wandb.asked
        assert (asked["project"], asked["entity"]) == ("hafl", "team")
        assert (asked["mode"], asked["name"]) == ("online", "flexlora-3")
        assert asked["dir"] == str(tmp_path / "run")
        assert (tmp_path / "run").is_dir()  # else wandb goes to the system's temporary folder
        assert asked["config"]["lora"] == {"max_rank": 16}
        assert [row["rank"] for row in asked["config"]["clients"]] == [2, 4, 16]

    def test_takes_the_keyboard_away_and_gives_it_back(self, wandb, tracker, monkeypatch):
        keyboard = io.StringIO()
        keyboard.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", keyboard)

        tracker.start({}, [])

        assert wandb.could_prompt is False
        assert sys.stdin is keyboard

    @pytest.mark.parametrize(
        "error",
        [
            FakeWandb.UsageError("No API key configured.\nUse `wandb login` to log in."),
            FakeWandb.AuthenticationError("rejected"),
        ],
    )
    def test_without_a_login_says_what_to_do_in_one_line(self, wandb, tracker, error):
        wandb.error = error

        with pytest.raises(TrackingError) as raised:
            tracker.start({}, [])

        message = str(raised.value)
        assert "set WANDB_API_KEY or use tracking.mode=offline" in message
        assert "\n" not in message

    def test_refused_settings_are_no_login(self, wandb, tracker):
        wandb.error = FakeWandb.UsageError("Invalid project name 'a/b'")

        with pytest.raises(TrackingError, match="Invalid project name 'a/b'") as raised:
            tracker.start({}, [])

        assert "WANDB_API_KEY" not in str(raised.value)

    def test_network_error_is_left_to_the_composite(self, wandb, tracker):
        wandb.error = ConnectionError("timed out")

        with pytest.raises(ConnectionError):
            tracker.start({}, [])

    def test_wandb_is_not_imported_before(self):
        code = "import sys, hafl_app.tracking.wandb; sys.exit('wandb' in sys.modules)"

        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestLog:
    def test_clients_and_round_share_a_step(self, wandb, tracker, round_record, client_record):
        tracker.start({}, [])
        for server_round in (1, 2):
            tracker.log_client(client_record(server_round=server_round, partition_id=7))
            tracker.log_client(
                client_record(
                    server_round=server_round, partition_id=8, loss=math.nan, error="died"
                )
            )
            tracker.log_round(round_record(server_round=server_round))

        assert sorted(wandb.run.steps) == [1, 2]
        step = wandb.run.steps[2]
        assert step["validation/accuracy"] == 0.512
        assert step["train/loss"] == 0.75
        assert step["round/bytes-down"] == 12_340_000
        assert step["client/7/loss"] == 0.8
        assert step["client/7/components-trained"] == 3
        assert (step["client/7/failed"], step["client/8/failed"]) == (0, 1)
        assert "client/8/loss" not in step

    def test_before_the_start_is_refused(self, tracker, round_record):
        with pytest.raises(RuntimeError, match="before start"):
            tracker.log_round(round_record())


class TestEnd:
    def test_finish_writes_the_summary(self, wandb, tracker):
        tracker.start({}, [])
        tracker.finish({"test/accuracy": 0.7})

        assert wandb.run.summary == {"status": "finished", "test/accuracy": 0.7}
        assert wandb.run.exit_code == 0

    def test_fail_writes_the_reason(self, wandb, tracker):
        tracker.start({}, [])
        tracker.fail("no replies")

        assert wandb.run.summary == {"status": "failed", "reason": "no replies"}
        assert wandb.run.exit_code == 1

    def test_fail_before_the_start_does_nothing(self, wandb, tracker):
        tracker.fail("no replies")

        assert wandb.run.exit_code is None


@pytest.mark.slow
class TestRealWandb:
    def test_offline_run_is_kept_in_the_folder(
        self, tmp_path, monkeypatch, client_rows, round_record, client_record
    ):
        monkeypatch.setenv("WANDB_MODE", "disabled")  # the setting wins over the environment
        monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
        tracker = WandbTracker("hafl", None, "offline", tmp_path / "run", "flexlora-3")

        tracker.start({"strategy": {"name": "flexlora"}}, client_rows)
        tracker.log_client(client_record())
        tracker.log_round(round_record())
        tracker.finish({"device_ranks": [{"rank": 2, "gain": 0.0625}]})

        pytest.importorskip("wandb").teardown()  # its service flushes the file when it ends
        (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
        kept = file.read_bytes()
        for part in (b'{"name":"flexlora"}', b"client/7/loss", b"test/accuracy", b"0.0625"):
            assert part in kept

    def test_online_without_a_key_never_asks(self, tmp_path):
        hidden = {name: value for name, value in os.environ.items() if "WANDB" not in name}
        environment = {
            **hidden,
            "HOME": str(tmp_path),
            "NETRC": str(tmp_path / "netrc"),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TERM": "xterm",
        }
        terminal, inside = os.openpty()
        process = subprocess.run(
            [sys.executable, "-c", ONLINE],
            cwd=tmp_path,
            env=environment,
            stdin=inside,
            stdout=inside,
            stderr=inside,
            timeout=60,
            check=False,
        )
        output = os.read(terminal, 1 << 16)
        os.close(terminal)
        os.close(inside)

        assert process.returncode == 1
        assert b"set WANDB_API_KEY or use tracking.mode=offline" in output
        assert len(output.strip().splitlines()) == 1
