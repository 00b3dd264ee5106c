"""The server's scores: of the adapter that is asked for, and not twice for the same."""

import json

import pytest
import torch
from running import TINY

from hafl_app.config.compose import compose
from hafl_app.lowrank.factors import LoraFactors, initial_adapter
from hafl_app.run import build
from hafl_app.run import watched_prompts as module
from hafl_app.run.evaluation import CentralEvaluation
from hafl_app.run.watched_prompts import num_watched, watched_prompts
from hafl_app.training.lora_model import adapter_shapes

KINDS = ("how", "what", "when", "why")


@pytest.fixture
def settings(tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [
        {"instruction": f"{KINDS[i % 4]} {i}" + " far" * (40 * (i % 8 < 2)), "kind": KINDS[i % 4]}
        for i in range(120)
    ]
    file.write_text("\n".join(json.dumps({**row, "input": "", "output": "so"}) for row in rows))
    data = ["dataset=instructions", f"dataset.path={file}", "dataset.label_column=kind"]
    return compose([*TINY, "model=tiny_random_causal", *data, "dataset.max_length=20"])


@pytest.fixture
def central(settings):
    return CentralEvaluation(settings, build.federated_text(settings, 5), {})


def adapters(settings, count):
    """Return adapters that all write something else."""
    first = initial_adapter(adapter_shapes(build.model_spec(settings, 4)), 2, seed=0)
    torch.manual_seed(0)
    return [
        first.map(lambda f: LoraFactors(f.lora_A, torch.randn_like(f.lora_B))) for _ in range(count)
    ]


def test_each_adapter_has_its_own_scores(settings, central):
    one, other = adapters(settings, 2)
    scores = [central.metrics(adapter, ["test"])["test/loss"] for adapter in (one, other, one)]
    assert scores[0] == scores[2] != scores[1]
    assert central.categories(one) != central.categories(other)


def test_the_last_adapter_is_scored_once(settings, central, monkeypatch):
    (adapter,) = adapters(settings, 1)
    central.metrics(adapter, ["test", "validation"])
    monkeypatch.setattr(CentralEvaluation, "_evaluator", lambda *_: pytest.fail("scored again"))
    assert set(central.categories(adapter)) <= set(KINDS)


def test_answers_are_those_of_the_adapter(settings, central):
    settings.federation.watch_prompts = ["how 1", "why 2"]
    answers = [
        [one["answer"] for one in central.answers(adapter)] for adapter in adapters(settings, 2)
    ]
    assert answers[0] != answers[1]
    assert [one["prompt"] for one in central.answers(adapters(settings, 1)[0])] == [
        watched.prompt for watched in watched_prompts(settings, 12)
    ]


class TestWatchedPrompts:
    def test_of_the_test_set_have_room_and_are_of_different_categories(self, settings, monkeypatch):
        monkeypatch.setattr(module, "num_watched", lambda *_: 3)
        found = watched_prompts(settings, 12)
        assert len({one.category for one in found}) == len(found) == 3
        assert all("far" not in one.prompt and one.expected == "so" for one in found)

    def test_more_than_categories_are_filled_up(self, settings, monkeypatch):
        monkeypatch.setattr(module, "num_watched", lambda *_: 6)
        found = watched_prompts(settings, 12)
        assert len({one.prompt for one in found}) == len(found) == 6
        assert {one.category for one in found} == set(KINDS)

    def test_are_none_where_nothing_could_be_read_from_them(self, settings):
        assert num_watched(settings, 12) == 0  # random weights
        settings.federation.watch_prompts = ["a"]
        assert num_watched(settings, 12) == 1
        settings.federation.central_evaluation = False
        assert num_watched(settings, 12) == 0
