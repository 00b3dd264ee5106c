"""Steps that are counted in tokens: batches gathered until their answers have enough of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from causal_factories import CAUSAL, pairs_of, random_pairs
from training_factories import plan_for, random_adapter

from hafl_app.training.batches import gathered, training_batches
from hafl_app.training.cohort import obstacle
from hafl_app.training.local import train
from hafl_app.training.lora_model import LoraModel
from hafl_app.training.settings import TrainOptions

PAIRS = random_pairs(23)
SGD = TrainOptions(batch_size=4, optimizer="sgd", learning_rate=0.5, max_grad_norm=0.0)
EVERYTHING = 10**6


@pytest.fixture(scope="module")
def model() -> LoraModel:
    return CAUSAL.build()


@pytest.fixture
def adapter(model):
    return random_adapter(model, 3)


def trained(model, adapter, options, examples=PAIRS, **plan):
    return train(model, adapter, plan_for(adapter, **plan), examples, options, seed=1)


def seen_by(model, monkeypatch):
    """Record the rows of every batch that goes through the model."""
    batch, seen = type(model).batch, []

    def noting(self, examples, rows):
        seen.append(rows.tolist())
        return batch(self, examples, rows)

    monkeypatch.setattr(type(model), "batch", noting)
    return seen


def distance(one, other):
    ours, others = one.adapter.tensors(), other.adapter.tensors()
    return max(float((ours[name] - others[name]).abs().max()) for name in ours)


class TestOneStep:
    """All rows in one step of plain SGD: its change is the gradient."""

    def test_is_that_of_one_batch_of_all_rows(self, model, adapter, monkeypatch):
        whole = trained(model, adapter, replace(SGD, batch_size=23))
        seen = seen_by(model, monkeypatch)

        parts = trained(model, adapter, replace(SGD, tokens_per_step=EVERYTHING))

        assert parts.steps == whole.steps == 1
        assert [len(rows) for rows in seen] == [4, 4, 4, 4, 4, 3]
        assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
        for name, tensor in whole.adapter.tensors().items():
            torch.testing.assert_close(parts.adapter.tensors()[name], tensor, rtol=1e-4, atol=1e-6)

    def test_and_not_the_mean_of_the_batches_means(self, model, adapter, monkeypatch):
        """These rows tell the two apart."""
        whole = trained(model, adapter, replace(SGD, batch_size=23))
        options = replace(SGD, tokens_per_step=EVERYTHING)
        right = distance(trained(model, adapter, options), whole)
        monkeypatch.setattr(model, "num_targets", lambda examples, rows: len(rows))

        assert distance(trained(model, adapter, options), whole) > 100 * right


class TestSteps:
    def test_have_as_many_targets_as_asked_for_and_no_batch_more(self, model):
        rng = np.random.default_rng(5)
        batches = list(training_batches(PAIRS, 4, rng))

        def targets(rows):
            return model.num_targets(PAIRS, rows)

        steps = list(gathered(batches, PAIRS, targets, 40))

        assert sorted(np.concatenate(steps).tolist()) == list(range(23))
        assert 1 < len(steps) < len(batches)
        for rows in steps[:-1]:
            last = max(targets(batch) for batch in batches if set(batch) <= set(rows))
            assert 40 <= targets(rows) < 40 + last
        lengths = np.diff(PAIRS.offsets)
        assert all((np.diff(lengths[rows]) >= 0).all() for rows in steps)

    def test_are_the_batches_where_each_has_enough(self, model, adapter):
        plain, one = trained(model, adapter, SGD), replace(SGD, tokens_per_step=1)
        assert distance(trained(model, adapter, one), plain) == 0

    def test_count_answers_alone(self, model, adapter):
        long_prompts = pairs_of([([5] * 40, [7, 8]) for _ in range(8)])
        options = replace(SGD, batch_size=2, tokens_per_step=8)
        assert trained(model, adapter, options, long_prompts).steps == 2

    def test_end_with_the_limit_of_steps(self, model, adapter):
        options = replace(SGD, tokens_per_step=30)
        assert trained(model, adapter, options, local_epochs=9, max_steps=4).steps == 4

    def test_go_through_in_smaller_parts_where_asked(self, model, adapter, monkeypatch):
        options = replace(SGD, tokens_per_step=EVERYTHING)
        whole = trained(model, adapter, options)
        seen = seen_by(model, monkeypatch)

        parts = trained(model, adapter, replace(options, micro_batch_size=3))

        assert {len(rows) for rows in seen} == {3, 2}
        assert distance(parts, whole) < 1e-5


def test_work_counts_what_goes_through_the_model(model, adapter, monkeypatch):
    seen = seen_by(model, monkeypatch)
    result = trained(model, adapter, replace(SGD, tokens_per_step=30))
    lengths = np.diff(PAIRS.offsets)
    [work] = result.passes
    padded = sum(len(rows) * lengths[rows].max() for rows in seen)
    assert sum(length * rows for length, rows in work.rows.items()) == padded


def test_such_clients_train_one_at_a_time():
    line = "client.tokens_per_step=30: a step goes through in parts"
    assert obstacle(replace(SGD, tokens_per_step=30)) == line
    assert obstacle(SGD) is None
