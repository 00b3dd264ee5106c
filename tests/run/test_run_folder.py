"""No run is lost to another one in its folder."""

import errno
import json
import os
import re
from datetime import datetime
from pathlib import Path
from unittest import mock

import pytest
from programs import ROOT, run_program
from running import LONE, TINY, run_tiny

from hafl_app.config.compose import SettingsError, compose
from hafl_app.run import run_folder
from hafl_app.run.command_line import CommandLine
from hafl_app.run.reporting import RunReport
from hafl_app.run.resumable_run import ResumeError
from hafl_app.run.run_folder import RunFolderError, check_new, output_folder, set_aside
from hafl_app.server import checkpoint_store
from hafl_app.server.coordinator import Coordinator
from hafl_app.server.method import StrategyError

SIMULATE = str(ROOT / "scripts" / "simulate.py")


def earlier_run(folder, status, last_round=None):
    (folder / "checkpoints").mkdir(parents=True)
    if status:
        (folder / "summary.json").write_text(json.dumps({"status": status}))
    if last_round is not None:
        (folder / "checkpoints" / f"round-{last_round:05d}.safetensors").touch()
    return folder


def content(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder): path.read_bytes() for path in files}


class TestNewFolder:
    @pytest.mark.parametrize(
        ("status", "last_round", "words"),
        [
            ("finished", 5, "a finished run; 'resume={}' goes on with it, another folder"),
            ("finished", None, "a finished run; another folder takes a new run"),
            ("interrupted", 4, "stopped after round 4; 'resume={}' goes on"),
            (None, 1, "stopped after round 1"),
        ],
    )
    def test_a_run_that_would_be_lost_refuses_it(self, tmp_path, status, last_round, words):
        folder = earlier_run(tmp_path / "my run", status, last_round)
        with pytest.raises(RunFolderError, match=re.escape(words.format(folder))):
            check_new(folder)

    @pytest.mark.parametrize(("status", "last_round"), [("failed", None), ("failed", 0), (None, 0)])
    def test_one_that_never_trained_is_replaced(self, tmp_path, status, last_round):
        check_new(earlier_run(tmp_path / "out", status, last_round))
        check_new(tmp_path / "none")

    def test_a_file_is_no_folder(self, tmp_path):
        (tmp_path / "out").touch()
        with pytest.raises(RunFolderError, match="a file; expected a folder"):
            check_new(tmp_path / "out")

    def test_after_a_clock_was_set_back_the_name_is_numbered(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        now = mock.Mock(**{"now.return_value": datetime(2026, 3, 29, 2, 30, 1)})
        monkeypatch.setattr(run_folder, "datetime", now)
        names = []
        for _ in range(3):
            folder = output_folder(compose([*TINY, "strategy=hetlora"]))
            folder.mkdir(parents=True)
            names.append(str(folder.relative_to(tmp_path)))
        first = "outputs/2026-03-29/02-30-01-hetlora"
        assert names == [first, f"{first}-2", f"{first}-3"]

    def test_a_resumed_run_goes_on_in_its_own(self, tmp_path):
        resume = f"resume={tmp_path / 'a'}"
        assert output_folder(compose([*TINY, resume])) == tmp_path / "a"
        with pytest.raises(RunFolderError, match="leave out output_dir"):
            output_folder(compose([*TINY, resume, f"output_dir={tmp_path / 'b'}"]))

    def test_a_comparison_keeps_finished_runs_beside_new_ones(self, tmp_path):
        folder = earlier_run(tmp_path / "seed0", "finished", 2)
        before = content(folder)
        set_aside(folder)
        assert content(tmp_path / "seed0-before") == before
        assert not folder.exists()
        set_aside(earlier_run(folder, "failed", 2))
        check_new(folder)


class TestPlaces:
    def placed(self, *arguments):
        line = CommandLine.of(arguments)
        return line.placed([compose([*TINY, *job]) for job in line.jobs()])

    def test_a_sweep_has_a_folder_for_each_job(self, tmp_path):
        dirs = self.placed("-m", "seed=0,1", f"output_dir={tmp_path / 'X'}")
        assert dirs == [
            f"hydra.sweep.dir='{tmp_path / 'X'}'",
            "hydra.sweep.subdir=${hydra.job.num}",
        ]

    def test_a_finished_job_refuses_the_sweep(self, tmp_path):
        earlier_run(tmp_path / "X" / "1", "finished")
        with pytest.raises(RunFolderError, match=f"{tmp_path}/X/1: it holds a finished run"):
            self.placed("-m", "seed=0,1", f"output_dir={tmp_path / 'X'}")

    def test_one_folder_for_all_jobs(self):
        with pytest.raises(SettingsError, match="expected one for the sweep"):
            self.placed("-m", "output_dir=a,b")

    def test_hydras_own_folders_hold(self):
        assert self.placed("hydra.run.dir=x") == []

    def test_quotes_are_not_part_of_the_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert self.placed('output_dir="my run"') == [f"hydra.run.dir='{tmp_path / 'my run'}'"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "my run"
    run_tiny(folder, "engine=inprocess", "federation.num_rounds=1")
    return folder


@pytest.mark.slow
class TestAFinishedRun:
    @pytest.mark.parametrize(
        "arguments",
        [
            ["output_dir='{}'"],
            ["++output_dir='{}'"],
            ["hydra.run.dir='{}'"],
            ["output_dir=elsewhere", "resume={}"],
        ],
        ids=lambda value: value[0][:10],
    )
    def test_is_refused_and_stays_as_it_is(self, finished, arguments, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        before = content(finished)
        own = [] if "resume" in arguments[-1] else [*TINY, "engine=inprocess"]
        done = run_program(SIMULATE, *own, *(a.format(finished) for a in arguments))
        assert done.returncode != 0
        assert len(done.stderr.strip().splitlines()) == 1
        assert re.search("holds a finished run|leave out output_dir=", done.stderr)
        assert content(finished) == before
        assert not list(tmp_path.iterdir())

    def test_the_app_itself_refuses_it(self, finished):
        before = content(finished)
        with pytest.raises(RunFolderError, match="finished run"):
            run_tiny(finished)
        assert content(finished) == before

    @pytest.mark.parametrize(
        ("owner", "name", "error"),
        [
            (Coordinator, "prepare", StrategyError("no node fits")),
            (RunReport, "resume", ResumeError("cannot go on")),
        ],
        ids=["nodes", "resume"],
    )
    def test_resuming_in_vain_leaves_it_as_it_is(self, finished, owner, name, error):
        before = content(finished)
        with mock.patch.object(owner, name, side_effect=error), pytest.raises(type(error)):
            run_tiny(finished, "engine=inprocess", "federation.num_rounds=2", f"resume={finished}")
        assert content(finished) == before


@pytest.mark.slow
def test_a_full_disk_in_a_checkpoint_keeps_the_last_one_and_names_the_path(tmp_path):
    folder, real = tmp_path / "out", os.fsync
    arguments = [*TINY, LONE.replace("1", "0"), "engine=inprocess", f"output_dir={folder}"]

    def full(descriptor):
        if "round-00002" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with mock.patch.object(checkpoint_store.os, "fsync", full):
        done = run_program(SIMULATE, *arguments)

    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert re.match(r"error: OSError: .*No space left on device: '.*round-00002.safetensors'", line)
    assert line.endswith(f"; after round 1, go on with: python {SIMULATE} resume={folder}")
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["round-00000.safetensors", "round-00001.safetensors"]
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
