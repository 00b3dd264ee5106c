"""A run as its folder tells it: how it stands, what is known, and what is damaged."""

import json
import math
import os
import time

import pytest
from run_folders import log_round, settings, write_run

from hafl_app.dashboard.folders import Root
from hafl_app.dashboard.runs import RunReader, phases_of
from hafl_app.run.run_lock import run_lock
from hafl_app.tracking.jsonl import JsonlTracker


def read(folder, name="run"):
    return RunReader(Root(folder)).read(name)


class TestState:
    @pytest.mark.parametrize("end", ["finished", "failed", "interrupted"])
    def test_a_run_that_ended(self, tmp_path, end):
        write_run(tmp_path / "run", end=end)
        assert read(tmp_path).state == end

    def test_one_that_goes_on(self, tmp_path):
        folder = tmp_path / "run"
        with run_lock(folder):
            tracker = JsonlTracker(folder)
            tracker.start({}, ())
            log_round(tracker, 0)
            assert read(tmp_path).state == "running"

    def test_one_that_waits_for_its_clients(self, tmp_path):
        with run_lock(tmp_path / "run"):
            assert read(tmp_path).state == "running"

    def test_one_that_was_resumed_has_an_earlier_end_for_a_while(self, tmp_path):
        folder = write_run(tmp_path / "run", end="failed")
        earlier = time.time() - 60
        os.utime(folder / "summary.json", (earlier, earlier))
        with run_lock(folder):
            assert read(tmp_path).state == "running"

    def test_one_whose_process_is_gone(self, tmp_path):
        folder = write_run(tmp_path / "run", end=None)
        (folder / ".lock").write_text("4194304")  # above the largest id of a process
        assert read(tmp_path).state == "stopped"

    def test_an_id_that_another_process_has_by_now_is_not_the_run(self, tmp_path):
        folder = write_run(tmp_path / "run", end=None)
        (folder / ".lock").write_text(str(os.getpid()))
        long_ago = time.time() - 10 * 86400
        os.utime(folder / ".lock", (long_ago, long_ago))
        assert read(tmp_path).state == "stopped"

    @pytest.mark.parametrize("text", ["", "x", "-1", "0", "9" * 30])
    def test_a_lock_that_names_no_process(self, tmp_path, text):
        folder = write_run(tmp_path / "run", end=None)
        (folder / ".lock").write_text(text)
        assert read(tmp_path).state == "stopped"


class TestFacts:
    def test_they_are_those_of_the_files(self, tmp_path):
        write_run(tmp_path / "run", method="flexlora", seed=7)
        run = read(tmp_path)
        assert (run.method, run.data, run.model, run.seed) == (
            "flexlora",
            "synthetic",
            "minilm",
            "7",
        )
        assert (run.last_round, run.num_rounds) == (3, "3")
        assert (run.bytes_down, run.bytes_up) == (9_000_000, 3_000_000)
        assert run.score == "test 75.0%"  # of the summary: scored at the end
        # That of most rounds first: the test data are scored at the end.
        assert phases_of([run]) == ["validation", "test"]
        assert not run.faults

    def test_test_scores_of_the_chosen_round_come_from_the_summary(self, tmp_path):
        folder = write_run(tmp_path / "run")
        summary = json.loads((folder / "summary.json").read_text())
        summary["best_validation"] = {"round": 2, "chosen_by": "accuracy", "test/accuracy": 0.6}
        (folder / "summary.json").write_text(json.dumps(summary))
        scores = read(tmp_path).scores("test")
        assert scores[2:] == [0.6, 0.75]
        assert all(map(math.isnan, scores[:2]))

    def test_a_run_that_goes_on_is_read_on(self, tmp_path):
        reader = RunReader(Root(tmp_path))
        with run_lock(tmp_path / "run"):
            tracker = JsonlTracker(tmp_path / "run")
            tracker.start({}, ())
            for server_round in range(3):
                log_round(tracker, server_round)
                assert reader.read("run").last_round == server_round

    def test_the_newest_comes_first(self, tmp_path):
        for place, name in enumerate("abc"):
            folder = write_run(tmp_path / name)
            for file in folder.iterdir():
                os.utime(file, (1000 * place, 1000 * place))
        assert [run.name for run in RunReader(Root(tmp_path)).all()] == ["c", "b", "a"]


class TestDamage:
    """Every file may be missing, cut or of another kind; the rest is shown, and a line says it."""

    FILES = ("metrics.jsonl", "summary.json", "config.yaml", "clients.json")

    @pytest.mark.parametrize("file", FILES)
    @pytest.mark.parametrize("content", [b"\xff\xfe\0", b"[1, 2", b"[]", b"- a: [", b"\n"])
    def test_a_damaged_file_is_named(self, tmp_path, file, content):
        folder = write_run(tmp_path / "run")
        (folder / file).write_bytes(content)
        run = read(tmp_path)
        assert run.name == "run"
        assert all(file in fault and "\n" not in fault for fault in run.faults)
        assert run.faults or content == b"\n"

    @pytest.mark.parametrize("file", FILES)
    def test_one_that_cannot_be_read_is_named(self, tmp_path, file):
        folder = write_run(tmp_path / "run")
        (folder / file).unlink(missing_ok=True)
        (folder / file).mkdir()
        assert any(file in fault for fault in read(tmp_path).faults)

    @pytest.mark.parametrize("odd", [None, 1, "x", [1], {"a": {}}])
    def test_values_of_other_kinds_are_shown_as_they_are(self, tmp_path, odd):
        folder = write_run(tmp_path / "run")
        tree = settings() | dict.fromkeys(("strategy", "model", "dataset", "federation"), odd)
        (folder / "config.yaml").write_text(json.dumps(tree))
        summary = dict.fromkeys(("status", "reason", "final", "best_validation", "model"), odd)
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "clients.json").write_text(json.dumps({"clients": odd, "left_out": odd}))
        run = read(tmp_path)
        assert (run.method, run.data, run.num_rounds) == ("", "", "")
        assert run.state == "stopped"

    def test_an_empty_folder_with_a_lock_is_a_run_without_anything(self, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".lock").touch()
        run = read(tmp_path)
        assert (run.last_round, run.score, run.state) == (-1, "", "stopped")
