"""The optimizer of local training: torch's fused kernel, with the loop's result."""

from dataclasses import replace

import pytest
import torch
from training_factories import SPEC, assert_same_adapter, plan_for, random_adapter, random_rows

from hafl_app.training.classifier import LoraClassifier
from hafl_app.training.local import train
from hafl_app.training.optimizer import build_optimizer
from hafl_app.training.settings import TrainOptions

OPTIONS = TrainOptions(batch_size=4, learning_rate=1e-2, lora_B_lr_ratio=3.0, weight_decay=0.1)
STEPS = 5


@pytest.fixture(scope="module")
def model() -> LoraClassifier:
    return LoraClassifier(SPEC)


def after_steps(model, optimizer):
    """Return the trained tensors after steps along fixed gradients."""
    generator = torch.Generator().manual_seed(4)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(STEPS):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in parameters])


def test_adamw_steps_as_torchs_plain_loop_does(model):
    adapter = random_adapter(model, 3)
    plan = plan_for(adapter, (2, 0))
    results = []
    for fused in (True, False):
        model.load(adapter, plan)
        optimizer = build_optimizer(model, plan, OPTIONS)
        assert optimizer.defaults["fused"] is True
        for group in optimizer.param_groups:
            group["fused"] = fused
        results.append(after_steps(model, optimizer))

    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("factors", ["A", "B"])
def test_a_factor_that_is_not_trained_is_neither_stepped_nor_decayed(model, optimizer, factors):
    adapter, rows = random_adapter(model, 3), random_rows(22)
    options = replace(OPTIONS, optimizer=optimizer, weight_decay=0.5)
    plan = plan_for(adapter, (2, 0), max_steps=STEPS)
    modules = {name: replace(m, factors=factors) for name, m in plan.modules.items()}

    train(model, adapter, replace(plan, modules=modules), rows, options, seed=1)

    for name, pair in model.trainable_factors().items():
        sent = adapter.modules[name].select((2, 0))
        stays = [torch.equal(*two) for two in zip(pair, (sent.lora_A, sent.lora_B), strict=True)]
        assert stays == [factors == "B", factors == "A"], name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_same_training_gives_the_same_bits(model, optimizer):
    adapter = random_adapter(model, 3)
    options = replace(OPTIONS, optimizer=optimizer)
    plan, rows = plan_for(adapter, (2, 0), max_steps=STEPS), random_rows(22)

    first, again = (train(model, adapter, plan, rows, options, seed=1).adapter for _ in "ab")

    assert_same_adapter(first, again)
