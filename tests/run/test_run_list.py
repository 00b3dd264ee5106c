"""Lists of runs: what is read of each, which are wanted, and that damage hides none."""

import json
import os
import subprocess
import sys

import pytest

from hafl_app.commands.main import main
from hafl_app.run.run_list import RunFilter, list_runs, read_entry
from hafl_app.run.run_lock import run_lock

SUMMARY = {
    "status": "finished",
    "name": "first",
    "tags": ["paper", "try2"],
    "strategy": {"_target_": "hafl_app.strategies.flexlora.FlexLora"},
    "dataset": {"source": "banking77"},
    "model": {"name": "minilm"},
    "seed": 3,
    "final": {"test/accuracy": 0.835, "validation/accuracy": 0.9},
}
CONFIG = """
strategy: {_target_: hafl_app.strategies.hetlora.HetLora}
dataset: {source: dolly}
model: {name: stories}
name: null
tags: [old]
seed: 1
"""
ROUND = {"kind": "round", "server_round": 1, "metrics": {"validation/perplexity": 41.03}}


def make(folder, summary=None, config=CONFIG, metrics=(), when=0):
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.yaml").write_text(config)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if metrics:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    for path in folder.iterdir():
        os.utime(path, (when, when))
    return folder


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "outputs"
    make(root / "day" / "b", SUMMARY, when=2_000_000)
    make(root / "day" / "a", metrics=[ROUND, {"kind": "client"}], when=3_000_000)
    make(root / "sweep" / "0" / "c", {"status": "failed", "reason": "x"}, when=1_000_000)
    return root


def names(runs):
    return [run.folder.name for run in runs]


class TestEntry:
    def test_a_finished_run_is_its_summary(self, root):
        run = read_entry(root / "day" / "b")

        assert (run.state, run.name, run.tags) == ("finished", "first", ("paper", "try2"))
        assert (run.method, run.data, run.model) == ("flexlora", "banking77", "minilm")
        assert (run.seed, run.score, run.changed) == ("3", "83.5%", 2_000_000)

    def test_without_a_summary_the_settings_and_the_last_round_speak(self, root):
        run = read_entry(root / "day" / "a")

        assert (run.state, run.name, run.tags) == ("stopped", "", ("old",))
        assert (run.method, run.data, run.seed) == ("hetlora", "dolly", "1")
        assert run.score == "ppl 41.03 validation"

    def test_a_locked_folder_is_a_run_that_goes_on(self, root):
        state = {"stage": "train", "round": 2, "rounds": 5, "done": 1, "asked": 8,
                 "seconds_left": 65.0, "written": 0.0}  # fmt: skip
        (root / "day" / "a" / "progress.json").write_text(json.dumps(state))
        with run_lock(root / "day" / "a"):
            run = read_entry(root / "day" / "a")
            assert (run.state, run.progress) == (
                "running", "round 2/5, training, 1 of 8 clients, ETA 1m05s",
            )  # fmt: skip

        assert read_entry(root / "day" / "a").state == "stopped"

    def test_looking_takes_no_lock_that_a_run_could_want(self, root, monkeypatch):
        with run_lock(root / "day" / "a"):
            monkeypatch.setattr("fcntl.flock", None)
            assert read_entry(root / "day" / "a").state == "running"

    def test_a_killed_run_is_none_that_goes_on(self, root):
        with subprocess.Popen(["true"]) as process:
            process.wait()
        (root / "day" / "a" / ".lock").write_text(str(process.pid))

        assert read_entry(root / "day" / "a").state == "stopped"

    def test_a_process_that_is_younger_than_the_lock_is_another_one(self, root):
        lock = root / "day" / "a" / ".lock"
        lock.write_text(str(os.getpid()))
        os.utime(lock, (2_000_000, 2_000_000))

        assert read_entry(root / "day" / "a").state == "stopped"

    @pytest.mark.parametrize("file", ["summary.json", "config.yaml", "metrics.jsonl"])
    @pytest.mark.parametrize(
        "text", ["", "[]", "\0", "{", "tags: 3\nstrategy: [1]", '{"final": 3, "dataset": {}}',
                 '{"kind": "round", "metrics": 3}', '{"tags": [[]], "dataset": {"source": []}}']
    )  # fmt: skip
    def test_damage_hides_no_run(self, root, file, text):
        (root / "day" / "b" / file).write_text(text)

        assert names(list_runs(root)).count("b") == 1


class TestList:
    def test_the_latest_is_last(self, root):
        assert names(list_runs(root)) == ["c", "b", "a"]

    def test_a_run_itself_can_be_named(self, root):
        assert names(list_runs(root / "day" / "b")) == ["b"]

    @pytest.mark.parametrize(
        ("wanted", "expected"),
        [
            (RunFilter(name="FIR"), ["b"]),
            (RunFilter(tags=["paper"]), ["b"]),
            (RunFilter(tags=["paper", "old"]), []),
            (RunFilter(method="hetlora"), ["c", "a"]),
            (RunFilter(data="dolly", state="failed"), ["c"]),
            (RunFilter(state="running"), []),
        ],
    )
    def test_only_what_is_wanted(self, root, wanted, expected):
        assert names(list_runs(root, wanted)) == expected

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--method", "flexora"], "--method flexora: no run"),
            (["--method", "flexora"], "did you mean 'flexlora'?"),
            (["--tag", "papre"], "did you mean 'paper'?"),
            (["--state", "done"], "'done' is not one of"),
            (["--last", "0"], "--last"),
        ],
    )
    def test_what_no_run_has_is_one_line(self, root, arguments, words, capsys):
        assert main(["runs", str(root), *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert len(error.splitlines()) == 1

    def test_no_such_folder_is_one_line(self, tmp_path, capsys):
        assert main(["runs", str(tmp_path / "none")]) == 2
        assert capsys.readouterr().err.endswith("none: no such folder\n")


class TestCommand:
    def test_two_lines_a_run(self, root, capsys, monkeypatch):
        monkeypatch.chdir(root.parent)
        assert main(["runs", "--last", "2"]) == 0

        first, more, path, *_ = capsys.readouterr().out.splitlines()
        assert first[16:] == "  finished      83.5%  flexlora  banking77  first  [paper, try2]"
        assert (more, path) == ("  minilm  seed 3", "  outputs/day/b")

    def test_paths_alone_for_another_command(self, root, capsys, monkeypatch):
        monkeypatch.chdir(root.parent)
        assert main(["runs", "--paths", "--data", "dolly"]) == 0

        assert capsys.readouterr().out.splitlines() == ["outputs/sweep/0/c", "outputs/day/a"]

    def test_no_runs_is_no_error(self, tmp_path, capsys):
        assert main(["runs", str(tmp_path)]) == 0
        assert capsys.readouterr().out.startswith("no run below")

    def test_a_hostile_name_moves_no_cursor_and_breaks_no_line(self, root, capsys):
        bad = {**SUMMARY, "name": "\x1b[2J" + "x" * 500, "tags": ["\n" * 5 + "y" * 99]}
        (root / "day" / "b" / "summary.json").write_text(json.dumps(bad))
        main(["runs", str(root)])

        text = capsys.readouterr().out
        assert "\x1b" not in text
        assert max(len(line) for line in text.splitlines() if not line.startswith("  /")) <= 80

    def test_nothing_heavy_is_imported(self, root):
        code = (
            "import sys; from hafl_app.commands.main import main; "
            f"main(['runs', {str(root)!r}]); "
            "print([m for m in ('torch', 'hydra', 'flwr', 'pandas', 'ray') if m in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], check=False, capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
