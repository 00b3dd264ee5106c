"""`hafl chat` from the command line to the terminal, a pipe, or one answer."""

import builtins
import io
import json
import re
import shutil
import sys

import pytest
from causal_factories import CAUSAL
from rich.console import Console
from running import run_tiny
from training_factories import random_adapter

from hafl_app.commands.main import main
from hafl_app.experiments import chat as chat_module
from hafl_app.training.adapter_files import save_adapter
from hafl_app.training.generate import AnswerCodec
from scripts import chat as script

LIMIT = ("--max-new-tokens", "4")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    adapter = random_adapter(CAUSAL.build(), 3, seed=5)
    facts = {"template": "ask {question}\n\nsay"}
    save_adapter(folder / "adapter", adapter, CAUSAL, label_names=(), max_length=16, facts=facts)
    return folder


@pytest.fixture
def typed(monkeypatch):
    """Gives standard input: of a terminal, or of a pipe."""

    def give(text, *, terminal):
        stream = io.StringIO(text)
        stream.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stdin", stream)

    return give


def said(capsys, *arguments):
    code = main(["chat", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def written_as(monkeypatch, text):
    monkeypatch.setattr(chat_module, "answer_codec", lambda *_: AnswerCodec(0, lambda _: text))


class TestOnePrompt:
    def test_is_answered_alone(self, run, capsys):
        code, out, err = said(capsys, run, "what is this", *LIMIT)
        assert (code, err) == (0, "")
        assert len(out.split()) == 4

    def test_who_answers_stands_before_each(self, run, capsys):
        code, out, _ = said(capsys, run / "adapter", "why", "--compare", "base,2,3", *LIMIT)
        assert code == 0
        assert [line[:8] for line in out.splitlines()] == ["base    ", "rank 2  ", "rank 3  "]

    def test_what_a_model_writes_moves_no_cursor_and_fits(self, run, capsys, monkeypatch):
        written_as(monkeypatch, f"\x1b[2J{'word ' * 30}\n    indented\r\u202e end")
        _, out, _ = said(capsys, run, "x", "--compare", "base,2", *LIMIT)
        lines = out.splitlines()
        assert lines[0].startswith("base    \\x1b[2Jword word")
        assert all(line.startswith("        word") for line in lines[1:3])
        assert lines[3:5] == ["            indented", "        \\u202e end"]
        assert max(map(len, lines)) <= 80
        assert not set("\x1b\r\u202e") & set(out)

    def test_an_empty_answer_shows(self, run, capsys, monkeypatch):
        written_as(monkeypatch, " \n")
        assert said(capsys, run, "x", *LIMIT)[1] == "(no answer)\n"

    @pytest.mark.parametrize(
        ("prompt", "answer"), [("", "the prompt is blank"), ("word " * 15, "leaves no room")]
    )
    def test_some_are_refused(self, run, capsys, prompt, answer):
        code, out, err = said(capsys, run, prompt, *LIMIT)
        assert (code, out) == (2, "")
        assert answer in err
        assert len(err.splitlines()) == 1

    def test_a_prompt_without_a_template_is_noted(self, run, capsys, tmp_path):
        card = json.loads((run / "adapter" / "hafl.json").read_text())
        (tmp_path / "hafl.json").write_text(json.dumps({**card, "facts": {}}))
        weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
        code, _, err = said(capsys, tmp_path, "x", *LIMIT)
        assert code == 0
        assert err == "note: the prompt of its training is not known; yours goes as it is\n"


class TestTerminal:
    @pytest.mark.parametrize("end", ["", "exit\nnever read", " QUIT \n"])
    def test_answers_until_the_end(self, run, capsys, typed, monkeypatch, end):
        written_as(monkeypatch, "an answer")
        typed(f"one\n\n{'word ' * 15}\ntwo\n{end}", terminal=True)
        code, out, err = said(capsys, run, *LIMIT)
        assert (code, err) == (0, "")
        assert out.count("> an answer") == 2
        assert "the prompt leaves no room" in out
        assert max(map(len, out.splitlines()[1:])) <= 80  # the first is a path

    @pytest.mark.parametrize("end", ["/exit", "/QUIT"])
    def test_commands_are_no_prompts(self, run, capsys, typed, monkeypatch, end):
        written_as(monkeypatch, "an answer")
        forgotten, real = [], chat_module.Chat.reset
        monkeypatch.setattr(chat_module.Chat, "reset", lambda it: forgotten.append(real(it)))
        typed(f"/reset\n/rest\n/home/me is a path\n{end}\nnever read", terminal=True)
        code, out, err = said(capsys, run, *LIMIT)
        assert (code, err) == (0, "")
        assert len(forgotten) == 2  # at the start, and when asked to
        assert "> /rest: expected /reset or /exit; did you mean '/reset'?" in out
        assert out.count("an answer") == 1

    def test_an_interruption_ends_it_without_a_word(self, run, capsys, typed, monkeypatch):
        def interrupted(_):
            raise KeyboardInterrupt

        typed("", terminal=True)
        monkeypatch.setattr(builtins, "input", interrupted)
        code, _, err = said(capsys, run, *LIMIT)
        assert (code, err) == (130, "\n")


class TestColumns:
    @pytest.fixture
    def terminal(self, monkeypatch):
        """Makes standard output a terminal of so many columns; returns what is written."""

        def make(width):
            console = Console(file=io.StringIO(), force_terminal=True, width=width, no_color=True)
            monkeypatch.setattr("hafl_app.tracking.as_text.get_console", lambda: console)
            return console.file

        return make

    @staticmethod
    def lines(file):
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
        return [line for line in text.replace("\r", "\n").splitlines() if "writing" not in line]

    def test_answers_stand_side_by_side_where_there_is_room(self, run, monkeypatch, terminal):
        written_as(monkeypatch, f"{'word ' * 20}\n    [bold]end")
        file = terminal(120)
        assert main(["chat", str(run), "x", "--compare", "base,2,3", *LIMIT]) == 0
        lines = [line for line in self.lines(file) if line.strip()]
        assert lines[0].split() == ["base", "rank", "2", "rank", "3"]
        starts = [lines[0].index(title) for title in ("base", "rank 2", "rank 3")]
        assert all(line[start:].startswith("word") for line in lines[1:3] for start in starts)
        assert [lines[-1].index("[bold]end", start) - start for start in starts] == [4, 4, 4]
        assert max(map(len, lines)) <= 120

    def test_else_one_below_the_other(self, run, monkeypatch, terminal):
        written_as(monkeypatch, "an answer")
        file = terminal(100)
        assert main(["chat", str(run), "x", "--compare", "base,2,3", *LIMIT]) == 0
        assert [line.rstrip() for line in self.lines(file)] == [
            "base    an answer",
            "rank 2  an answer",
            "rank 3  an answer",
        ]


class TestPipe:
    def test_every_line_is_answered(self, run, capsys, typed, monkeypatch):
        written_as(monkeypatch, "an answer")
        typed("one\r\n\nexit\n", terminal=False)
        assert said(capsys, run, *LIMIT) == (0, "an answer\n\nan answer\n\n", "")

    def test_one_that_is_not_is_named(self, run, capsys, typed, monkeypatch):
        written_as(monkeypatch, "an answer")
        typed(f"one\n{'word ' * 15}\nthree\n", terminal=False)
        code, out, err = said(capsys, run, *LIMIT)
        assert (code, out) == (2, "an answer\n\n\nan answer\n\n")
        assert err.startswith("error: line 2: the prompt leaves no room")


@pytest.mark.slow
def test_a_real_run_is_talked_to_by_the_script(tmp_path, capsys, monkeypatch):
    file = tmp_path / "mine.jsonl"
    rows = [{"instruction": f"what is {i % 7}", "input": "", "output": "it"} for i in range(60)]
    file.write_text("\n".join(map(json.dumps, rows)))
    data = ("dataset=instructions", f"dataset.path={file}", "dataset.max_length=20")
    run = tmp_path / "run"
    run_tiny(run, "model=tiny_random_causal", "federation.num_rounds=1", *data)
    capsys.readouterr()
    # By itself it still has its prompt.
    moved = shutil.copytree(run / "adapter", tmp_path / "moved")
    given = ("chat.py", str(moved), "what is 3", "--compare", "base,2,adapter", *LIMIT)
    monkeypatch.setattr(sys, "argv", list(given))
    assert script.main() == 0
    captured = capsys.readouterr()
    assert [line[:9] for line in captured.out.splitlines()] == [
        "base     ",
        "rank 2   ",
        "adapter  ",
    ]
    assert "note:" not in captured.err
