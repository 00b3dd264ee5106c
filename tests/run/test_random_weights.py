"""A model with random weights says so: in its name, in a warning, in the summary."""

import json
import logging
from dataclasses import replace

import pytest
import yaml
from running import TINY

from hafl_app.config.compose import CONF, compose
from hafl_app.engines.in_process import run_federation
from hafl_app.experiments.table import Provenance, markdown
from hafl_app.run.setup import warn_of_weights
from hafl_app.run.summary import model_facts
from hafl_app.training.settings import ModelSettings


@pytest.mark.parametrize("file", sorted((CONF / "model").glob("*.yaml")), ids=lambda f: f.stem)
def test_a_file_is_called_random_if_its_weights_are(file):
    settings = yaml.safe_load(file.read_text())

    assert ("random" in file.stem.split("_")) is settings.get("random_weights", False)
    assert settings["name"] == file.stem


@pytest.mark.parametrize(
    ("name", "is_random", "title"),
    [
        ("minilm", False, "minilm"),
        ("minilm", True, "minilm_random"),
        ("tiny_random", True, "tiny_random"),
    ],
)
def test_the_name_says_so_whoever_gave_it(name, is_random, title):
    model = ModelSettings(name=name, random_weights=is_random)

    assert model_facts(model) == {
        "name": title,
        "path": "",
        "revision": None,
        "random_weights": is_random,
        "dropout": False,
    }


def test_one_line_warns(caplog):
    model = compose(["model=minilm"]).model
    with caplog.at_level(logging.WARNING):
        warn_of_weights(model)
        assert not caplog.messages
        warn_of_weights(replace(model, random_weights=True))

    (line,) = caplog.messages
    assert line == ("model minilm_random has random weights: its scores only compare with its own")


def test_a_run_says_so(tmp_path, caplog):
    overrides = ["federation.num_clients=2", "federation.num_rounds=1", f"output_dir={tmp_path}"]
    with caplog.at_level(logging.WARNING):
        run_federation([*TINY, *overrides])

    assert [line.split(":")[0] for line in caplog.messages if "random" in line] == [
        "model tiny_random has random weights"
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["model"] == {
        "name": "tiny_random",
        "path": "",
        "revision": None,
        "random_weights": True,
        "dropout": False,
    }
    assert "random-weights" in (tmp_path / "adapter" / "README.md").read_text()


def test_a_comparison_names_its_models():
    source = Provenance("t", "b", "c", "h", (0,), "l", "v", models=("tiny_random", "a|b"))

    assert "- model: tiny_random, a\\|b\n" in markdown([], {}, source)
