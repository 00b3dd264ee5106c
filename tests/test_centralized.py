"""Centralized LoRA: all the data, as many passes, and the loss goes down."""

import json

import numpy as np
import pytest
import torch

from hafl_app.config.compose import compose
from hafl_app.data.text import EncodedText
from hafl_app.experiments.centralized import num_passes, train_centralized, union
from hafl_app.run import build
from hafl_app.training.adapter_files import load_adapter
from hafl_app.training.evaluate import evaluate
from scripts import centralized as script

TINY = (
    "model=tiny_random",
    "dataset.num_train=200",
    "dataset.num_test=60",
    "dataset.max_length=16",
    "federation.num_clients=4",
    "federation.num_rounds=3",
    "client.local_epochs=2",
    "client.batch_size=16",
    "client.learning_rate=1e-2",
    "lora.max_rank=5",
    "ranks=homogeneous",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("centralized")
    lines = []
    return folder, train_centralized(compose(TINY), folder, lines.append), lines


def test_trains_on_everything_that_the_clients_train_on(finished):
    _, summary, _ = finished
    text = build.federated_text(compose(TINY), 4)
    assert summary["num_examples"] == sum(text.sizes())
    assert summary["passes"] == 6
    assert summary["steps"] == 6 * -(-sum(text.sizes()) // 16)
    assert summary["rank"] == 5


def test_is_scored_after_every_pass(finished):
    folder, summary, lines = finished
    assert [p["pass"] for p in summary["each_pass"]] == [1, 2, 3, 4, 5, 6]
    assert summary["each_pass"][-1]["loss"] < summary["each_pass"][0]["loss"]
    assert len(lines) == 1 + 6
    assert json.loads((folder / "summary.json").read_text())["final"] == summary["final"]
    best = max(
        summary["each_pass"], key=lambda p: (p["validation/accuracy"], -p["validation/loss"])
    )
    assert summary["best_validation"]["pass"] == best["pass"]
    assert summary["best_validation"]["chosen_by"] == "accuracy"


def test_the_saved_adapter_scores_the_last_pass(finished):
    folder, summary, _ = finished
    loaded = load_adapter(folder / "adapter")
    text = build.federated_text(compose(TINY), 4)
    assert evaluate(loaded.model, text.test).accuracy == summary["final"]["test/accuracy"]
    assert loaded.facts["template"] is None  # there are no prompts


def test_scoring_does_not_disturb_training(finished, tmp_path, monkeypatch):
    from hafl_app.experiments import centralized

    folder, _, _ = finished
    real = centralized.train
    monkeypatch.setattr(centralized, "train", lambda *args: real(*args[:-1], lambda *_: None))
    monkeypatch.setattr(centralized, "_summary", lambda *_: {"final": {}})
    train_centralized(compose(TINY), tmp_path, lambda _: None)
    first, second = (load_adapter(f / "adapter").model.head_state() for f in (folder, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 6), (0.5, 3), (0.1, 1)])
def test_as_many_passes_as_the_federation(fraction, expected):
    assert num_passes(compose([*TINY, f"federation.fraction_train={fraction}"])) == expected


def test_union_keeps_rows_and_labels():
    parts = [
        EncodedText(np.array([1, 2, 3], np.int32), np.array([0, 1, 3]), np.array([4, 5])),
        EncodedText(np.zeros(0, np.int32), np.array([0]), np.zeros(0, np.int64)),
        EncodedText(np.array([7, 8], np.int32), np.array([0, 2]), np.array([6])),
    ]
    together = union(parts)
    assert [together.row(i).tolist() for i in range(len(together))] == [[1], [2, 3], [7, 8]]
    assert together.labels.tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("federation.num_round=3", "did you mean federation.num_rounds?"),
        ("experiment=hafl_bankin", "did you mean hafl_banking77?"),
        ("lora.max_rank=0", "must be at least 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(argument, message, monkeypatch, capsys):
    monkeypatch.setattr(script.sys, "argv", ["centralized.py", argument])
    assert script.main() != 0
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
