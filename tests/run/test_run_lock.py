"""One process at a time in the folder of a run, and which run is the latest."""

import os
import time

import pytest

from hafl_app.run.resumable_run import ResumeError, latest_run
from hafl_app.run.run_lock import RunLockedError, check_unlocked, run_lock


def checkpoint(folder, seconds_from_now):
    path = folder / "checkpoints" / "round-1.safetensors"
    path.parent.mkdir(parents=True)
    path.touch()
    at = time.time() + seconds_from_now
    os.utime(path, (at, at))


class TestLock:
    def test_a_second_run_is_refused_and_nothing_is_written(self, tmp_path):
        with run_lock(tmp_path):
            (tmp_path / "flower.log").write_text("of the first")
            before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
            with pytest.raises(RunLockedError, match=f"process {os.getpid()} is still running"):
                check_unlocked(tmp_path)
            assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
        check_unlocked(tmp_path)

    def test_a_new_folder_is_not_made(self, tmp_path):
        check_unlocked(tmp_path / "new")
        assert not (tmp_path / "new").exists()


class TestLatest:
    def test_it_is_the_one_written_last(self, tmp_path):
        checkpoint(tmp_path / "a", -50)
        checkpoint(tmp_path / "b", -100)
        assert latest_run(tmp_path) == tmp_path / "a"

    def test_after_the_clock_was_set_back_it_is_not_guessed(self, tmp_path):
        checkpoint(tmp_path / "before", 3500)
        checkpoint(tmp_path / "after", -100)
        with pytest.raises(ResumeError, match=f"clock was set back.*resume={tmp_path}/before$"):
            latest_run(tmp_path)

    def test_a_single_run_is_the_latest_whatever_the_clock_says(self, tmp_path):
        checkpoint(tmp_path / "only", 3500)
        assert latest_run(tmp_path) == tmp_path / "only"
