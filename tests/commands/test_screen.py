"""What a command shows of its runs: a line that moves on a terminal, and the block at the end."""

import io
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from running import TINY

from hafl_app.commands import screen as screens
from hafl_app.commands.main import main
from hafl_app.commands.screen import Screen
from hafl_app.process_identity import seconds_of_process
from hafl_app.tracking.as_text import WIDTH
from hafl_app.tracking.closing import Clock, next_commands, time_line

STATE = {"stage": "alone", "round": 11, "rounds": 10, "done": 1_000, "asked": 2_000,
         "seconds_left": 86_000.0, "written": 0.0}  # fmt: skip


def terminal(**changes):
    settings = {"force_terminal": True, "width": WIDTH, "color_system": None, **changes}
    return Console(file=io.StringIO(), **settings)


def shown(console):
    return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line)
            for line in re.split(r"[\r\n]", console.file.getvalue())]  # fmt: skip


class TestLine:
    def frame(self, folder, state):
        (folder / "progress.json").write_text(json.dumps({**state, "written": time.time()}))
        console = terminal()
        screen = Screen(console)
        screen._folder = folder
        console.print(screen._line())
        return shown(console)

    @pytest.mark.parametrize(
        "state", [STATE, {**STATE, "round": 10, "stage": "train"}, {**STATE, "seconds_left": None}]
    )
    def test_it_fits_a_terminal_of_80_columns(self, tmp_path, state):
        lines = [line for line in self.frame(tmp_path, state) if line.strip()]
        assert len(lines) == 1
        assert cell_len(lines[0]) <= WIDTH
        assert "1000 of 2000 clients" in lines[0]
        assert "so far)" in lines[0]

    def test_before_there_is_a_run_it_says_what_is_checked(self):
        console = terminal()
        console.print(Screen(console)._line())
        assert "checking settings" in console.file.getvalue()


class TestTerminal:
    def test_something_moves_while_a_run_says_nothing(self, tmp_path):
        console = terminal()
        with Screen(console) as screen:
            screen.follow(tmp_path)
            time.sleep(1.2)

        frames = [line for line in shown(console) if "at work" in line]
        assert len(set(frames)) >= 2

    def test_nothing_moves_in_a_pipe(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        console = Console(file=io.StringIO(), width=WIDTH)
        with Screen(console) as screen:
            screen.follow(tmp_path / "run")
            time.sleep(0.7)

        assert console.file.getvalue() == "Output folder: run\n"

    def test_a_dumb_terminal_is_none(self):
        assert not Screen(terminal(_environ={"TERM": "dumb"})).is_live


class TestTime:
    STAGES = {"train": 30.0, "score": 8.0, "alone": 0.0}  # noqa: RUF012

    def test_stages_and_rest_add_up_to_the_clock(self):
        line = time_line(Clock(60.0), self.STAGES)
        assert line == "1 min 00 s: training 30 s, scoring 8.0 s, start and rest 22 s"

    def test_a_resumed_run_says_what_came_before(self):
        assert time_line(Clock(20.0, 100.0), {}) == "20 s"
        line = time_line(Clock(60.0, 100.0), self.STAGES)
        assert line.startswith("1 min 00 s after 1 min 40 s before it stopped: training 30 s")

    def test_a_process_knows_how_long_it_has_been_there(self):
        code = (
            "import time; time.sleep(0.5); "
            "from hafl_app.process_identity import seconds_of_process; print(seconds_of_process())"
        )
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        passed = time.monotonic() - started

        assert 0.5 <= float(done.stdout) <= passed + 0.05
        assert seconds_of_process() > float(done.stdout) - passed


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run the command as a newcomer does, and return its folder, output and seconds."""
    place = tmp_path_factory.mktemp("somewhere")
    words = [sys.executable, "-m", "hafl_app.commands", "simulate", *TINY, "engine=inprocess",
             "federation.num_rounds=1", "name=first", "tags=[a,b]"]  # fmt: skip
    started = time.monotonic()
    done = subprocess.run(words, check=False, capture_output=True, text=True, cwd=place)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = place.glob("outputs/*/*")
    return folder, done.stdout, seconds, words


@pytest.mark.slow
class TestCommand:
    def test_every_line_but_paths_fits_80_columns(self, finished):
        _, out, _, _ = finished
        lines = [line for line in out.splitlines() if not line.startswith(("Next", "         "))]
        assert max(map(cell_len, lines)) <= WIDTH

    def test_the_time_is_that_of_the_clock(self, finished):
        _, out, seconds, _ = finished
        found = re.search(r"^Time +(?:(\d+) min )?(\d+(?:\.\d)?) s", out, re.MULTILINE)
        said = 60 * int(found[1] or 0) + float(found[2])
        # What Python does behind the last line is what is missing, and the digits of the line.
        assert said <= seconds + 0.5
        assert said >= 0.8 * seconds - 1

    def test_the_summary_names_where_it_comes_from(self, finished):
        folder, _, _, words = finished
        summary = json.loads((folder / "summary.json").read_text())

        assert (summary["name"], summary["tags"]) == ("first", ["a", "b"])
        assert shlex.split(summary["command"])[1:] == words[3:]
        assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", summary["commit"])
        assert summary["dataset"]["source"] == "synthetic"
        assert summary["model"]["name"] == "tiny_random"
        assert summary["machine"]["cpus"] >= 1
        assert {"host", "processor", "memory_total_mb"} <= summary["machine"].keys()
        assert sum(summary["stages"].values()) <= summary["seconds"]

    def test_no_trace_of_the_progress_is_left(self, finished):
        assert not list(finished[0].glob("progress*"))

    def test_the_next_commands_work_as_they_are_printed(self, finished):
        folder, out, _, _ = finished
        place = folder.parents[2]
        block = out[out.index("\nNext") :].removeprefix("\nNext").replace("\\\n", " ")
        commands = [line.strip() for line in block.splitlines() if line.strip()]

        assert len(commands) == 2
        for command in commands:
            done = subprocess.run(
                command, shell=True, check=False, capture_output=True, text=True, cwd=place
            )
            assert done.returncode == 0, command + done.stdout + done.stderr

    def test_it_is_found_by_its_tag(self, finished, capsys, monkeypatch):
        monkeypatch.chdir(finished[0].parents[2])
        assert main(["runs", "--tag", "a", "--name", "first", "--paths"]) == 0
        assert Path(capsys.readouterr().out.strip()).absolute() == finished[0]


class TestNextCommands:
    NODES = [{"rank": 2}, {"rank": 8}]  # noqa: RUF012

    @pytest.fixture(autouse=True)
    def place(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("hafl_app.tracking.closing.hafl_command", lambda: "hafl")
        return tmp_path

    def test_they_are_as_short_as_they_can_be_typed(self, place):
        _, export = next_commands({"nodes": self.NODES}, place / "outputs" / "a b")
        assert export == "hafl export 'outputs/a b' --rank 2 --output exported"

    def test_one_rank_is_not_cut(self, place):
        _, export = next_commands({"nodes": self.NODES[:1]}, place / "run")
        assert "--rank" not in export

    def test_the_output_is_a_new_folder(self, place):
        (place / "exported").mkdir()
        (place / "exported-2").mkdir()
        _, export = next_commands({}, place / "run")
        assert export.endswith("--output exported-3")

    def test_a_long_one_is_two_lines_that_a_shell_reads_as_one(self, place):
        folder = place / "outputs" / "2026-11-26" / "21-15-39-flexlora_change"
        _, export = next_commands({"nodes": self.NODES}, folder)
        assert all(len(line) <= WIDTH for line in f"{'':9}{export}".splitlines())
        words = shlex.split(export.replace("\\\n", ""))
        assert words[-4:] == ["--rank", "2", "--output", "exported"]

    def test_a_model_that_writes_is_talked_to(self, place):
        summary = {"nodes": self.NODES, "metric": "perplexity"}
        chat, _, _ = next_commands(summary, place / "run")
        assert chat == "hafl chat run --compare base,2,adapter"
        chat, _, _ = next_commands({"metric": "perplexity"}, place / ("long" * 20))
        assert chat.endswith(" \\\n           --compare base,adapter")


def test_the_block_needs_a_finished_run(tmp_path):
    console = terminal()
    screens.print_run(tmp_path, 1.0, console)
    assert console.file.getvalue() == ""
