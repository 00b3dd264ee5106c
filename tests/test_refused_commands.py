"""What a refused command imports before it answers: nothing that takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHOD = frozenset({"torch", "flwr"})
"""What the class of a method needs: its settings cannot be checked without."""
HEAVY = METHOD | {
    *("transformers", "peft", "datasets", "flwr_datasets", "pandas", "pyarrow"),
    *("sklearn", "scipy", "matplotlib", "seaborn", "ray", "wandb"),
}

NAMES = [
    ("simulate federation.num_round=3", "federation.num_rounds"),
    ("simulate federation.num_rounds", "expected name=value"),
    ("simulate federation.num_rounds=three", "federation.num_rounds"),
    ("simulate federation.num_rounds=-1", "federation.num_rounds=-1"),
    ("simulate client.learning_rate=-1", "client.learning_rate=-1"),
    ("simulate engine=inproces", "did you mean inprocess"),
    ("simulate strategy=hafll", "did you mean hafl"),
    ("simulate strategy.freezing=7", "no such setting"),
    ("simulate experiment=dem", "did you mean demo"),
    ("simulate dataset=banking", "no such dataset"),
    ("simulate strategy=hafl,flexlora", "add -m"),
    ("simulate --nope", "unrecognized arguments"),
    ("simulate resume=/nope", "no checkpoint there"),
    ("compare experiment=dem", "no such experiment"),
    ("compare methods=hafl,flexlra", "did you mean flexlora"),
    ("compare experiment=hafl_banking77 nope=1", "nope=1: no such setting"),
    ("compare experiment=hafl_banking77 seeds=x", "expected whole numbers"),
    ("evaluate", "adapter= must be given"),
    ("evaluate adapter=none model=minilm nope=1", "nope=1: no such setting"),
    ("export /nope --output /nope/new", "/nope: not a saved adapter"),
    ("export /nope --output /nope/new --public", "--push"),
    ("chat /nope", "/nope: not a saved adapter"),
    ("centralized nope=1", "nope=1: no such setting"),
    ("plots rank-collapse nope=1", "nope=1: no such setting"),
    ("plots curves /nope", "no readable metrics.jsonl"),
    ("plots energy /nope", "no readable metrics.jsonl"),
    ("plots importance /nope --output x.gif", "expected a name that ends in .png, .svg, .pdf"),
    ("plots labels nope=1", "nope=1: no such setting"),
    ("report /nope", "/nope: no such folder"),
    ("report tests/reports", "tests/reports: no run in it"),
    ("report outputs --output README.md", "README.md: a file; expected a folder"),
    ("report outputs --output docs", "docs: it holds something else than a report"),
    ("chaos bad=x", "expected a number from 0 to 1"),
]
"""Faults that show in names, types, ranges and folders."""

OTHERS = [
    ("simulate strategy.learning_rate=-1", "strategy.learning_rate=-1"),
    ("simulate privacy=central_dp", "privacy=central_dp does not cover"),
    ("simulate federation.upload=mixed", "federation.upload=mixed"),
    ("simulate dataset=local dataset.path=/nope.csv", "no file or folder '/nope.csv'"),
    ("simulate model.path=/nope", "model.path=/nope: no such folder"),
    ("evaluate adapter=/nope", "/nope: not a saved adapter"),
    ("compare experiment=hafl_banking77 dataset.path=/nope", "no file or folder '/nope'"),
    ("compare experiment=hafl_banking77 methods=nope", "methods=nope"),
]
"""Faults that show once all names are right."""

_IMPORT = "import time:"  # begins what -X importtime reports


def refuse(line):
    """Return the last line of a command that must be refused, and the packages it imported."""
    script, *arguments = line.split()
    command = [sys.executable, "-X", "importtime", str(ROOT / "scripts" / f"{script}.py")]
    result = subprocess.run(
        [*command, *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2, result.stderr[-1000:]
    lines = result.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith(_IMPORT)}
    return [line for line in lines if not line.startswith(_IMPORT)][-1], imported & HEAVY


@pytest.mark.parametrize(("line", "answer"), NAMES, ids=[line for line, _ in NAMES])
def test_a_wrong_name_is_answered_without_heavy_imports(line, answer):
    said, heavy = refuse(line)

    assert answer in said
    assert not heavy


@pytest.mark.parametrize(
    ("task", "answer"),
    [("causal_lm", "rank 5: expected 1 to 4"), ("classification", "task is classification")],
)
def test_what_an_adapters_card_says_refuses_a_chat_without_heavy_imports(task, answer, tmp_path):
    card = {"base": {"task": task}, "ranks": {"layer": 4}}
    (tmp_path / "hafl.json").write_text(json.dumps(card))

    said, heavy = refuse(f"chat {tmp_path} --compare base,5")

    assert answer in said
    assert not heavy


@pytest.mark.parametrize(("line", "answer"), OTHERS, ids=[line for line, _ in OTHERS])
def test_what_does_not_go_together_is_answered_before_model_and_data_are_read(line, answer):
    said, heavy = refuse(line)

    assert answer in said
    assert heavy <= METHOD
