"""Centralized LoRA: all the data, as many passes, and the loss goes down."""

import json

import numpy as np
import pytest
import torch

from hafl_app.config.compose import compose
from hafl_app.data.text import EncodedText
from hafl_app.experiments.centralized import num_passes, train_centralized, union
from hafl_app.experiments.comparison import Job, Rates
from hafl_app.experiments.running import is_finished, run_job
from hafl_app.lowrank.factors import Adapter
from hafl_app.lowrank.svd import truncated_svd
from hafl_app.reports.curve import read_curve
from hafl_app.run import build
from hafl_app.training.adapter_files import load_adapter, read_adapter
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
    assert len(lines) == 1 + 1 + 6  # the heading, the untrained model, six passes
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


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "seed0"
    overrides = [*TINY, "ranks=two_to_sixteen", "lora.max_rank=16", "client.max_steps=1"]
    overrides += ["federation.score_device_ranks=true", f"output_dir={folder}"]
    job = Job("", "all", 0, Rates(1e-2), tuple(overrides), folder, centralized=True)
    assert run_job(job).error == ""
    return job


class TestInAComparison:
    def test_its_curve_begins_untrained(self, job):
        its = read_curve(job.folder)

        summary = json.loads((job.folder / "summary.json").read_text())
        assert summary["steps"] == 3 * 4 * 1  # rounds, clients, steps of each
        assert its.test[-1] == summary["final"]["test/accuracy"]
        assert len(its.test) == 1 + len(summary["each_pass"])
        assert its.sent[-1] == 0
        assert its.client_seconds > 0

    def test_its_slices_are_scored_at_the_clients_ranks(self, job):
        its = read_curve(job.folder)

        assert list(its.at_rank) == [2, 4, 8, 16]
        assert its.at_rank[16] == its.test[-1]
        loaded = load_adapter(job.folder / "adapter")
        stored = read_adapter(job.folder / "adapter").adapter
        cut = {name: truncated_svd(factors, 2) for name, factors in stored.modules.items()}
        loaded.model.load_whole(Adapter(cut, stored.head))
        text = build.federated_text(compose(TINY), 4)
        assert evaluate(loaded.model, text.test).accuracy == its.at_rank[2]

    def test_a_federation_of_the_same_settings_is_another_run(self, job):
        settings = compose(job.overrides)

        assert is_finished(job.folder, settings, centralized=True)
        assert not is_finished(job.folder, settings)


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
