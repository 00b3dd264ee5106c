"""Federations of causal language models in process: prompts, answers, perplexity."""

import math
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from running import LONE, instructions, records, run_tiny

from hafl_app.client import handlers
from hafl_app.client.node import Node
from hafl_app.config.compose import SettingsError, compose
from hafl_app.experiments.budget import equal_mean_bytes_rank
from hafl_app.experiments.centralized import train_centralized
from hafl_app.lowrank.factors import Adapter
from hafl_app.reports.curve import read_curve
from hafl_app.run import build
from hafl_app.run.preflight import check
from hafl_app.training import lora_model
from hafl_app.training.adapter_files import load_adapter
from hafl_app.training.evaluate import AnswerScores, evaluate
from hafl_app.training.task import TrainResult

pytestmark = pytest.mark.slow

SHARED = Path(__file__).resolve().parents[2] / "shared"
COLORS = ("red", "blue", "green")
REAL = (
    "experiment=dolly_stories260k",
    f"dataset.path={SHARED / 'data' / 'dolly15k_10clients'}",
    f"model.path={SHARED / 'models' / 'stories260k'}",
)


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> tuple[str, ...]:
    """Return settings of a federation on a file of 90 prompts, of which 5 are too long."""
    rows = [
        {
            "instruction": f"which color comes after {COLORS[i % 3]}" + " now" * (30 * (i < 5)),
            "input": "today" if i % 2 else "",
            "output": f"after {COLORS[i % 3]} comes {COLORS[(i + 1) % 3]}",
            "kind": COLORS[i % 3],
        }
        for i in range(90)
    ]
    return (
        *instructions(tmp_path_factory.mktemp("data"), rows),
        "dataset.label_column=kind",
        "dataset.max_length=24",
        "client.learning_rate=1e-2",
        "client.local_epochs=2",
        "client.batch_size=8",
        "federation.test_every=1",
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, causal):
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, run_tiny(folder, *causal, LONE)


class TestRun:
    def test_perplexity_falls_on_held_out_answers(self, finished):
        folder, summary = finished
        rounds = [r["metrics"] for r in records(folder, "round")]
        for phase in ("validation", "test"):
            assert rounds[-1][f"{phase}/perplexity"] < 0.98 * rounds[0][f"{phase}/perplexity"]
            assert rounds[-1][f"{phase}/perplexity"] == pytest.approx(
                math.exp(rounds[-1][f"{phase}/loss"])
            )
        assert "test/accuracy" not in rounds[-1]
        assert summary["metric"] == "perplexity"

    def test_clients_score_themselves(self, finished):
        folder, _ = finished
        last = records(folder, "round")[-1]["metrics"]
        assert last["clients/perplexity"] == pytest.approx(math.exp(last["clients/loss"]))
        assert 0 <= last["clients/token-accuracy"] <= 1

    def test_the_best_round_is_that_of_the_lowest_perplexity(self, finished):
        folder, summary = finished
        trained = records(folder, "round")[1:]
        lowest = min(trained, key=lambda r: r["metrics"]["validation/perplexity"])
        assert summary["best_validation"]["round"] == lowest["server_round"]
        assert read_curve(folder).best_round == lowest["server_round"]

    def test_no_head_travels(self, finished):
        _, summary = finished
        assert all(r["head_bytes_up"] == 0 for r in summary["bytes"]["train"]["by_rank"].values())

    def test_rows_without_room_for_an_answer_do_not_count(self, finished, causal):
        folder, _ = finished
        first = [c for c in records(folder, "client") if c["server_round"] == 1]
        text = build.federated_text(compose(causal), 5)
        trained = sum(client["num_examples"] for client in first)
        assert trained == sum(len(text.train(i)) for i in range(5))
        assert trained < sum(text.sizes())

    def test_the_saved_adapter_scores_the_last_line(self, finished, causal):
        folder, summary = finished
        loaded = load_adapter(folder / "adapter")
        scores = evaluate(loaded.model, build.federated_text(compose(causal), 5).test)
        assert scores.named("test")["test/perplexity"] == summary["final"]["test/perplexity"]

    def test_a_gain_is_a_lower_perplexity(self, finished):
        _, summary = finished
        rows = summary["device_ranks"]
        assert [row["rank"] for row in rows] == [2, 4, 8]
        for row in rows:
            assert row["gain"] == pytest.approx(row["alone"] - row["federated"])

    @pytest.mark.parametrize("strategy", ["hetlora", "flexlora"])
    def test_other_methods(self, tmp_path, causal, strategy):
        final = run_tiny(tmp_path, *causal, f"strategy={strategy}")["final"]
        first = records(tmp_path, "round")[0]["metrics"]
        assert final["test/perplexity"] < 0.98 * first["test/perplexity"]

    def test_categories_are_shared_out_with_skew(self, causal):
        settings = compose([*causal, "partition=dirichlet", "partition.dirichlet_alpha=0.3"])
        text = build.federated_text(settings, 3)
        assert text.label_names == tuple(sorted(COLORS))
        counts = [np.bincount(text.train(i).labels, minlength=3) for i in range(3)]
        assert max(c.max() / c.sum() for c in counts) > 0.6  # a third each without skew


def test_micro_batches_and_checkpoints_change_no_result(finished, causal, tmp_path):
    folder, _ = finished
    run_tiny(tmp_path, *causal, "client.micro_batch_size=3", "client.gradient_checkpointing=true")
    for ours, expected in zip(records(tmp_path, "round"), records(folder, "round"), strict=True):
        for name, value in expected["metrics"].items():
            assert ours["metrics"][name] == pytest.approx(value, rel=1e-3), name


def echo(model, adapter, plan, examples, options, seed, correction=None):
    """Train nothing: return what was to be trained as it came."""
    modules = {n: f.select(plan.modules[n].trainable_slots) for n, f in adapter.modules.items()}
    scores = {n: torch.ones(f.rank) for n, f in modules.items()}
    head = adapter.head if plan.head == "averaged" else {}
    return TrainResult(
        plan, Adapter(modules, head), len(examples.labels), 1.0, 1, 0.1, 0.0, 1.0, scores, 8
    )


@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_without_central_evaluation_the_server_loads_no_weights(
    tmp_path, causal, monkeypatch, task
):
    def load_base(*_):
        raise AssertionError("the weights were loaded")

    lora_model.resident_model.cache_clear()
    monkeypatch.setattr(lora_model, "load_base", load_base)
    monkeypatch.setattr(Node, "model", lambda *_: Mock())
    monkeypatch.setattr(handlers, "train_locally", echo)
    monkeypatch.setattr(handlers, "score", lambda *_: AnswerScores(2.0, 0.5, 30, 3))

    overrides = causal if task == "causal_lm" else ()
    summary = run_tiny(tmp_path, *overrides, "federation.central_evaluation=false")

    assert summary["status"] == "finished"
    assert not any(name.startswith(("test/", "validation/")) for name in summary["final"])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    if task == "causal_lm":
        assert summary["final"]["clients/perplexity"] == pytest.approx(math.exp(2.0))
    with pytest.raises(AssertionError, match="weights were loaded"):
        run_tiny(tmp_path / "central", *overrides)


class TestSettings:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (("model=tiny_random_causal",), "needs prompts with answers"),
            (("model=tiny_random_causal", "dataset=on_device"), "the nodes' conversations"),
            (("model=tiny_random", "dataset=dolly", "dataset.path=x"), "model=causal"),
        ],
    )
    def test_model_and_data_of_different_tasks_are_refused(self, overrides, message):
        with pytest.raises(SettingsError, match=message) as caught:
            check(compose(overrides))
        assert "\n" not in str(caught.value)

    def test_a_local_head_is_refused(self, causal):
        with pytest.raises(SettingsError, match="has no head"):
            check(compose([*causal, "model.head=local"]))

    @pytest.mark.parametrize("shape", ["llama_1b_random", "llama_7b_random"])
    def test_large_shapes_pass_the_checks_without_memory(self, causal, shape):
        overrides = [o for o in causal if not o.startswith("model=")]
        check(compose([*overrides, f"model={shape}"]))

    def test_ranks_can_follow_from_memory(self, causal, tmp_path):
        needed = build.step_memory(compose(causal), 1).needed_mb(5)
        run_tiny(
            tmp_path,
            *causal,
            "ranks=from_memory",
            "ranks.memory_margin=0",
            f"ranks.memory_limit_mb={math.ceil(needed)}",
            "federation.num_rounds=1",
            "federation.alone_clients_per_rank=0",
        )
        assert {c["rank"] for c in records(tmp_path, "client")} <= {5, 6, 7, 8}


def test_one_rank_at_the_mean_bytes_of_mixed_ones(causal):
    settings = compose([*causal, "strategy=zero_padding", "federation.num_clients=10"])
    assert equal_mean_bytes_rank(settings) == 5  # (3 x 2 + 3 x 4 + 4 x 8) / 10


def test_centralized_training(causal, tmp_path):
    lines: list[str] = []
    settings = compose(
        [*causal, "federation.num_clients=5", "federation.num_rounds=2", "client.local_epochs=1"]
    )

    summary = train_centralized(settings, tmp_path, lines.append)

    perplexities = [each["validation/perplexity"] for each in summary["each_pass"]]
    assert summary["best_validation"]["validation/perplexity"] == min(perplexities)
    assert "test token accuracy" in lines[0]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data and ../shared/models")
@pytest.mark.parametrize("strategy", ["hafl", "hetlora", "flexlora"])
def test_dolly_with_stories260k(tmp_path, strategy):
    run_tiny(
        tmp_path,
        *REAL,
        "model=stories260k",
        "dataset=dolly",
        f"strategy={strategy}",
        "federation.num_clients=10",
        "federation.num_rounds=1",
        "dataset.max_examples=600",
        "dataset.max_length=128",
        "federation.test_every=1",
    )
    first, last = (records(tmp_path, "round")[i]["metrics"] for i in (0, -1))
    assert last["test/perplexity"] < 0.9 * first["test/perplexity"]
    assert len({c["rank"] for c in records(tmp_path, "client")}) == 4
