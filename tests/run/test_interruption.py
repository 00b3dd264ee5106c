"""Ctrl-C and SIGTERM: the status, the exit code, and a command that goes on with the run."""

import json
import os
import shlex
import signal
from unittest import mock

import pytest
from programs import ROOT, run_program
from running import LONE, TINY, records, run_tiny

from hafl_app.run.going_on import RunWatch
from hafl_app.run.resuming import RunCheckpoints

SIMULATE = str(ROOT / "scripts" / "simulate.py")
RUN = (*TINY, LONE.replace("1", "0"), "federation.num_rounds=3", "engine=inprocess")


def interrupting(after_round, number):
    """Send this process a signal as soon as a round's checkpoint is written."""
    save = RunCheckpoints.save

    def saving(self, strategy, report, grid, server_round):
        save(self, strategy, report, grid, server_round)
        if server_round == after_round:
            os.kill(os.getpid(), number)

    return mock.patch.object(RunCheckpoints, "save", saving)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def command_in(line):
    program, script, *arguments = shlex.split(line.partition(" with: ")[2])
    assert program == "python"
    return script, arguments


@pytest.fixture(autouse=True)
def _signals_arrive():
    """Take Ctrl-C also where the tests were started in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def last_line(stopped):
    """Return the one line that a stopped program leaves, behind warnings of its settings."""
    *before, line = stopped.stderr.strip().splitlines()
    assert all(one.startswith("warning: ") for one in before)
    return line


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_printed_command_goes_on_with_the_run(tmp_path, number):
    folder = tmp_path / "my run (1)"
    with interrupting(1, number):
        stopped = run_program(SIMULATE, *RUN, f"output_dir='{folder}'")

    assert stopped.returncode == 130
    line = last_line(stopped)
    assert line.startswith(f"interrupted after round 1; go on with: python {SIMULATE}")
    assert summary_of(folder) == {"status": "interrupted", "reason": "interrupted"}

    script, arguments = command_in(line)
    assert run_program(script, *arguments).returncode == 0
    assert summary_of(folder)["status"] == "finished"
    run_tiny(tmp_path / "whole", "federation.num_rounds=3", "engine=inprocess")
    assert records(folder, "round") == records(tmp_path / "whole", "round")


@pytest.mark.slow
def test_what_a_resumed_run_changed_is_in_the_command_too(tmp_path):
    folder = tmp_path / "out"
    one_round = [*RUN, "federation.num_rounds=1", f"output_dir={folder}"]
    assert run_program(SIMULATE, *one_round).returncode == 0
    with mock.patch.object(RunCheckpoints, "check_base_model", side_effect=KeyboardInterrupt):
        stopped = run_program(SIMULATE, f"resume={folder}", "federation.num_rounds=2")

    assert summary_of(folder)["status"] == "finished"  # it has not begun to go on
    script, arguments = command_in(stopped.stderr)
    assert run_program(script, *arguments).returncode == 0
    assert summary_of(folder)["rounds"] == 2


@pytest.mark.slow
def test_before_the_first_checkpoint_the_same_command_starts_again(tmp_path):
    arguments = [*RUN, "federation.num_rounds=1", f"output_dir={tmp_path / 'out'}"]
    with mock.patch.object(RunCheckpoints, "save", side_effect=KeyboardInterrupt):
        stopped = run_program(SIMULATE, *arguments)

    assert stopped.returncode == 130
    assert last_line(stopped).startswith(
        "interrupted before the first checkpoint; start again with:"
    )
    assert summary_of(tmp_path / "out")["status"] == "interrupted"
    assert command_in(stopped.stderr)[1] == arguments
    assert run_program(SIMULATE, *arguments).returncode == 0


class TestWatch:
    """What is left of a run whose processes were stopped, as a simulation on Ray stops them."""

    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "checkpoints").mkdir()
        return tmp_path

    def watch(self, folder, *arguments):
        return RunWatch(folder, ("python", "simulate.py"), arguments)

    def checkpoint(self, folder, number):
        (folder / "checkpoints" / f"round-{number:05d}.safetensors").touch()

    def test_a_run_that_was_killed_is_marked(self, folder):
        watch = self.watch(folder, "seed=1")
        self.checkpoint(folder, 4)
        assert watch.interrupted() == (
            f"interrupted after round 4; go on with: python simulate.py resume={folder}"
        )
        assert summary_of(folder)["status"] == "interrupted"

    def test_a_failure_that_the_stop_caused_is_an_interruption(self, folder):
        watch = self.watch(folder)
        (folder / "summary.json").write_text('{"status": "failed", "reason": "channel closed"}')
        watch.interrupted()
        assert summary_of(folder)["status"] == "interrupted"

    def test_the_summary_of_an_earlier_run_stays(self, folder):
        (folder / "summary.json").write_text('{"status": "finished"}')
        self.checkpoint(folder, 4)
        watch = self.watch(folder, f"resume={folder}", "federation.num_rounds=9")
        line = watch.interrupted()
        assert summary_of(folder) == {"status": "finished"}
        assert line.endswith(f"resume={folder} federation.num_rounds=9")

    def test_a_run_that_finished_says_so(self, folder):
        watch = self.watch(folder)
        (folder / "summary.json").write_text('{"status": "finished"}')
        assert watch.interrupted() == f"interrupted, but the run is finished: {folder}"

    def test_a_failed_run_says_how_to_go_on_only_if_it_trained(self, folder):
        watch = self.watch(folder)
        self.checkpoint(folder, 0)
        assert watch.failed() == ""
        self.checkpoint(folder, 2)
        assert watch.failed() == (
            f"; after round 2, go on with: python simulate.py resume={folder}"
        )
