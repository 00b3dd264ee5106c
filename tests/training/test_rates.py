"""Learning rates of a plan: what the optimizer steps with."""

from dataclasses import replace

import pytest
import torch
from training_factories import SPEC, assert_same_adapter, plan_for, random_adapter, random_rows

from hafl_app.training.local import train
from hafl_app.training.optimizer import Rates, build_optimizer
from hafl_app.training.settings import TrainOptions

OPTIONS = TrainOptions(batch_size=4, learning_rate=1e-2, lora_B_lr_ratio=3.0)
ROWS = random_rows(11)


@pytest.fixture(scope="module")
def model():
    return SPEC.build()


@pytest.fixture
def adapter(model):
    return random_adapter(model, 3)


def rates_of_steps(model, plan, most_rows, rows):
    """Return the rates that lora_A and lora_B are stepped with, step by step."""
    optimizer = build_optimizer(model, plan, OPTIONS)
    rates, found = Rates(optimizer, plan, most_rows), []
    for step in range(len(rows)):
        rates.before_step(step, sum(rows[:step]))
        found.append(tuple(group["lr"] for group in optimizer.param_groups))
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_one_rate_is_a_smaller_learning_rate(model, adapter, optimizer):
    options = replace(OPTIONS, optimizer=optimizer, weight_decay=0.1)
    plan = plan_for(adapter, (0, 2), local_epochs=2)
    lower = replace(options, learning_rate=0.25 * options.learning_rate)

    slowed = train(model, adapter, replace(plan, rates=(0.25,)), ROWS, options, seed=1)

    assert_same_adapter(slowed.adapter, train(model, adapter, plan, ROWS, lower, seed=1).adapter)


def test_each_part_of_the_training_has_its_own(model, adapter):
    """Of two epochs the second one stands nearly still."""
    options = replace(OPTIONS, optimizer="sgd", max_grad_norm=0.0)
    once = train(model, adapter, plan_for(adapter), ROWS, options, seed=1).adapter.tensors()
    plan = plan_for(adapter, local_epochs=2, rates=(1.0, 1e-9))

    twice = train(model, adapter, plan, ROWS, options, seed=1).adapter.tensors()

    for name, tensor in once.items():
        torch.testing.assert_close(twice[name], tensor, rtol=1e-5, atol=1e-7)


class TestParts:
    RATES = (1.0, 0.5, 0.1)

    def test_are_epochs_where_there_are_as_many(self, model, adapter):
        plan = plan_for(adapter, local_epochs=3, rates=self.RATES)
        model.load(adapter, plan)
        found = rates_of_steps(model, plan, 11, [4, 4, 3] * 3)
        assert found == [(r * 1e-2, r * 3e-2) for r in self.RATES for _ in range(3)]

    def test_are_steps_where_those_end_the_training(self, model, adapter):
        plan = plan_for(adapter, local_epochs=30, max_steps=6, rates=self.RATES)
        model.load(adapter, plan)
        found = rates_of_steps(model, plan, 11, [4, 4, 3] * 2)
        assert [a for a, _ in found] == [1e-2, 1e-2, 5e-3, 5e-3, 1e-3, 1e-3]

    def test_with_both_limits_the_nearer_one_counts(self, model, adapter):
        plan = plan_for(adapter, local_epochs=1, max_steps=600, rates=self.RATES)
        model.load(adapter, plan)
        found = rates_of_steps(model, plan, 11, [4, 4, 3])
        assert [a for a, _ in found] == [1e-2, 5e-3, 1e-3]
