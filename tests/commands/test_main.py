"""The `hafl` command: its help, its mistakes, completion, and settings files of one's own."""

import os
import shlex
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete
from programs import ROOT

from hafl_app.commands.main import hafl, main
from hafl_app.config.compose import SettingsError, compose
from hafl_app.config.files import OWN_FOLDER, ConfigFolderError, groups, use_own_folder

COMMANDS = [*hafl.commands]
MINE = "# @package _global_\ndefaults:\n  - override /strategy: flexlora\nseed: 7\n"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())


def said(capsys, *arguments):
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_shows_an_example_within_80_columns(self, command, capsys):
        code, out, _ = said(capsys, command, "--help")
        assert code == 0
        assert f"\n    hafl {command} " in out
        assert max(map(len, out.splitlines())) <= 80

    @pytest.mark.parametrize("command", ["simulate", "compare", "evaluate"])
    def test_the_settings_of_an_example_exist(self, command, capsys, monkeypatch):
        _, out, _ = said(capsys, command, "--help")
        lines = [line for line in out.splitlines() if line.startswith(f"    hafl {command} ")]
        own = ("seeds", "adapter", "resume")
        assert lines
        for line in lines:
            words = shlex.split(line)[2:]
            given = [w for w in words if "=" in w and "," not in w and w.split("=")[0] not in own]
            compose(given)

    @pytest.mark.parametrize("asked", [(), ("help",), ("-h",)], ids=str)
    def test_the_commands_are_listed(self, asked, capsys):
        code, out, _ = said(capsys, *asked)
        assert code == 0
        assert all(f"\n  {command} " in out for command in COMMANDS)

    def test_help_goes_before_or_after_a_command(self, capsys):
        before, after = said(capsys, "help", "export"), said(capsys, "export", "help")
        assert before == after
        assert "--rank 4 8" in before[1]


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("simulat", "simulat: no such command; did you mean simulate?"),
        ("sim", "did you mean simulate?"),
        ("rounds=3", "settings come after one, as in hafl simulate rounds=3"),
        ("train", "there are simulate, compare"),
        ("export", "Missing argument 'RUN'"),
        ("export run 4 --output x", "4: expected one RUN; ranks stand after --rank"),
        ("export /nope --output /nope/new", "/nope: not a saved adapter"),
        ("plots curv", "did you mean curves?"),
        ("simulate --config-dir /nope seed=1", "--config-dir /nope: no such folder"),
        ("simulate -m --rounds=3", "did you mean federation.num_rounds=3?"),
    ],
)
def test_a_mistake_is_one_line(line, answer, capsys):
    code, _, err = said(capsys, *line.split())
    assert code == 2
    assert answer in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("strat", "strategy="),
        ("strategy=flexlora_", "strategy=flexlora_change"),
        ("engine=in", "engine=inprocess"),
        ("federation.num_r", "federation.num_rounds="),
        ("model.dropout=", "model.dropout=true"),
    ],
)
def test_the_shell_completes_settings_and_values(typed, offered):
    shell = ShellComplete(hafl, {}, "hafl", "_HAFL_COMPLETE")
    found = shell.get_completions(["simulate"], typed)
    assert offered in [item.value for item in found]


def test_nothing_heavy_is_imported_before_names_are_checked():
    code = "import sys; from hafl_app.commands.main import main; main(['simulate', 'rounds=3']);"
    code += "print({'torch', 'flwr', 'pandas', 'datasets'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "did you mean federation.num_rounds?" in done.stderr
    assert done.stdout.strip() == "set()"


class TestOwnFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "experiment").mkdir()
        (tmp_path / "experiment" / "mine.yaml").write_text(MINE)
        return tmp_path

    def test_they_are_settings_like_those_of_the_app(self, folder):
        with pytest.raises(SettingsError, match="no such experiment"):
            compose(["experiment=mine"])
        use_own_folder(str(folder))
        settings = compose(["experiment=mine"])
        assert (settings.seed, type(settings.strategy).__name__) == (7, "FlexLora")
        assert {"mine", "demo"} <= set(groups()["experiment"])
        assert os.environ[OWN_FOLDER] == str(folder)  # the run's processes inherit it

    def test_a_command_takes_them(self, folder, capsys):
        line = ("simulate", "--config-dir", str(folder), "experiment=mine", "--cfg", "job")
        code, out, err = said(capsys, *line)
        assert code == 0, err
        assert "seed: 7" in out

    def test_one_that_would_hide_a_file_of_the_app_is_refused(self, folder):
        (folder / "experiment" / "demo.yaml").write_text(MINE)
        with pytest.raises(ConfigFolderError, match=r"experiment/demo.yaml would hide"):
            use_own_folder(str(folder))

    def test_a_folder_without_any_is_refused(self, tmp_path):
        with pytest.raises(ConfigFolderError, match="expected files in folders such as"):
            use_own_folder(str(tmp_path))
