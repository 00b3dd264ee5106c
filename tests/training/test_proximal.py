"""FedProx: the proximal term in local training."""

from dataclasses import replace

import pytest
import torch
from driving import STRATEGIES, Client, run_options, strategy_named
from torch import nn
from training_factories import (
    SPEC,
    WIDE,
    assert_same_adapter,
    differing,
    plan_for,
    random_adapter,
    random_rows,
)

from hafl_app.lowrank.factors import Adapter
from hafl_app.server import local_baseline
from hafl_app.training.classifier import LoraClassifier
from hafl_app.training.local import train
from hafl_app.training.optimizer import build_optimizer
from hafl_app.training.proximal import ProximalTerm
from hafl_app.training.settings import TrainOptions

WEIGHT = 5.0
ROWS = random_rows(5)  # all in one batch: its order in an epoch does not matter
SGD = TrainOptions(
    batch_size=5, optimizer="sgd", learning_rate=0.01, lora_B_lr_ratio=3.0, max_grad_norm=0.0
)


@pytest.fixture(scope="module")
def classifier() -> LoraClassifier:
    return LoraClassifier(SPEC)


@pytest.fixture(scope="module")
def adapter(classifier) -> Adapter:
    return random_adapter(classifier, 3)


def trained(classifier, adapter, proximal, steps, options=SGD, **settings):
    plan = plan_for(adapter, (2, 0), scaling=2.5, local_epochs=steps, **settings)
    return train(classifier, adapter, replace(plan, proximal=proximal), ROWS, options, seed=3)


def distance(sent: Adapter, result: Adapter) -> float:
    """Return how far the trained components and the head are from what was sent."""
    changes = [
        *(result.modules[n].lora_A - f.select((2, 0)).lora_A for n, f in sent.modules.items()),
        *(result.modules[n].lora_B - f.select((2, 0)).lora_B for n, f in sent.modules.items()),
        *(result.head[n] - tensor for n, tensor in sent.head.items()),
    ]
    return float(torch.cat([change.flatten() for change in changes]).norm())


def test_adds_its_gradient_to_that_of_the_batch():
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]]))
    without = nn.Parameter(torch.ones(2))
    term = ProximalTerm([parameter, without], 0.5)
    parameter.grad = torch.full((2, 3), 10.0)
    with torch.no_grad():
        parameter += torch.tensor([[4.0, 0.0, -2.0], [0.0, 0.0, 6.0]])

    term.add_gradient()

    assert parameter.grad.tolist() == [[12.0, 10.0, 9.0], [10.0, 10.0, 13.0]]
    assert without.grad is None


def test_training_minimizes_the_loss_with_the_term(classifier, adapter):
    """The oracle writes the term into the loss, and lets autograd do the rest."""
    plan = plan_for(adapter, (2, 0), scaling=2.5)
    classifier.load(adapter, plan)
    classifier.eval()
    optimizer = build_optimizer(classifier, plan, SGD)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sent = [p.detach().clone() for p in parameters]
    for _ in range(4):
        optimizer.zero_grad()
        near = sum(((p - s) ** 2).sum() for p, s in zip(parameters, sent, strict=True))
        loss = classifier.loss(classifier.batch(ROWS, torch.arange(5).numpy()))
        (loss + WEIGHT / 2 * near).backward()
        optimizer.step()
    expected = classifier.trained(plan)

    result = trained(classifier, adapter, WEIGHT, steps=4).adapter

    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(result.tensors()[name], tensor, rtol=1e-4, atol=1e-5)
    without = trained(classifier, adapter, 0.0, steps=4).adapter
    assert not torch.allclose(without.modules[WIDE].lora_B, result.modules[WIDE].lora_B, rtol=1e-2)
    assert not torch.allclose(without.head["weight"], result.head["weight"], rtol=1e-2)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_keeps_near_and_the_first_step_as_it_is(classifier, adapter, optimizer):
    options = replace(SGD, optimizer=optimizer, learning_rate=0.02)
    plain, near = (trained(classifier, adapter, w, 1, options).adapter for w in (0.0, 20.0))
    assert_same_adapter(plain, near)
    plain, near = (trained(classifier, adapter, w, 8, options).adapter for w in (0.0, 20.0))
    assert distance(adapter, near) < 0.9 * distance(adapter, plain)


def test_the_clipped_gradient_has_the_term_in_it(classifier, adapter):
    """With a term as large as this the step is a pull back, however small it is clipped to."""
    options = replace(SGD, max_grad_norm=1e-3, learning_rate=1.0, lora_B_lr_ratio=1.0)
    result = trained(classifier, adapter, 1e6, 2, options).adapter
    # The second step leads back by as much as the first one led away.
    assert distance(adapter, result) < 1e-5


def test_importance_is_of_the_loss_alone(classifier, adapter):
    """Measured at the second step, from parameters that the first has moved alike."""
    scores = [
        trained(classifier, adapter, w, 2, importance="sensitivity").importance for w in (0.0, 5.0)
    ]
    for name, measured in scores[0].items():
        assert torch.equal(measured, scores[1][name])


def test_a_frozen_head_and_factor_have_none(classifier, adapter):
    plan = plan_for(adapter, (2, 0), head="frozen", local_epochs=3, proximal=5.0)
    modules = {name: replace(m, factors="B") for name, m in plan.modules.items()}
    train(classifier, adapter, replace(plan, modules=modules), ROWS, SGD, seed=1)
    for name, (lora_A, _) in classifier.trainable_factors().items():
        assert torch.equal(lora_A, adapter.modules[name].select((2, 0)).lora_A)
    for name, tensor in classifier.head_state().items():
        assert torch.equal(tensor, adapter.head[name])


def test_none_is_bit_for_bit_without(classifier, adapter):
    plain, without = (trained(classifier, adapter, w, 3).adapter for w in (0.0, 0.0))
    assert differing(plain, without) == []
    assert not ProximalTerm([nn.Parameter(torch.ones(2))], 0.0)._sent


class TestPlans:
    @pytest.mark.parametrize("name", STRATEGIES)
    def test_of_every_method_have_the_clients_weight(self, name):
        strategy = strategy_named(name)
        assert strategy.plan(Client(3, 10, 0).profile, 1).proximal == 0.0
        strategy.options = run_options(strategy.options, proximal=0.25)
        assert strategy.plan(Client(3, 10, 0).profile, 1).proximal == 0.25

    def test_of_clients_that_train_alone_have_none(self, monkeypatch):
        strategy = strategy_named("rbla")
        strategy.options = run_options(strategy.options, proximal=0.25)
        plans = []

        class Messages:
            def messages(self, profiles, made, dispatch, kind):
                plans.extend(made)

            def validate_training(self, replies):
                return []

            def close(self, replies):
                return []

        monkeypatch.setattr(strategy.coordinator, "messages", lambda *_: Messages())
        monkeypatch.setattr(local_baseline, "all_replies", lambda *_, **__: [])
        profile = Client(3, 10, 0).profile
        local_baseline.train_alone(strategy, None, strategy.global_adapter, [profile], 1)

        assert [plan.proximal for plan in plans] == [0.0]
