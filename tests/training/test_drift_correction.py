"""SCAFFOLD in local training: gradients with a fixed correction, and what the server reads off."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from training_factories import SPEC, WIDE, plan_for, random_adapter, random_rows

from hafl_app.lowrank.factors import Adapter
from hafl_app.server.control_variates import ControlVariates
from hafl_app.server.update import ClientUpdate
from hafl_app.training.classifier import LoraClassifier
from hafl_app.training.local import train
from hafl_app.training.optimizer import build_optimizer
from hafl_app.training.settings import ClientSettings

ROWS = random_rows(5)  # all in one batch: its order in an epoch does not matter
SGD = ClientSettings(
    batch_size=5, optimizer="sgd", learning_rate=0.01, lora_B_lr_ratio=3.0, max_grad_norm=0.0
)
SCALING = 2.5


@pytest.fixture(scope="module")
def classifier() -> LoraClassifier:
    return LoraClassifier(SPEC)


@pytest.fixture(scope="module")
def adapter(classifier) -> Adapter:
    return random_adapter(classifier, 3)


@pytest.fixture(scope="module")
def correction(classifier) -> Adapter:
    return random_adapter(classifier, 2, seed=9)


def by_hand(classifier, adapter, plan, correction, steps):
    """Return what training ends with, and the mean of the gradients of the loss alone.

    The oracle adds ``<correction, w>`` to the loss: autograd finds the corrected gradients.
    """
    classifier.load(adapter, plan)
    optimizer = build_optimizer(classifier, plan, SGD)
    names = {}
    for name, (lora_A, lora_B) in classifier.trainable_factors().items():
        names |= {f"lora_A/{name}": lora_A, f"lora_B/{name}": lora_B}
    names |= {f"head/{n}": p for n, p in classifier.head_module.named_parameters()}
    sums = {name: torch.zeros_like(p) for name, p in names.items()}
    for _ in range(steps):
        optimizer.zero_grad()
        loss = classifier.loss(classifier.batch(ROWS, np.arange(5)))
        gradients = torch.autograd.grad(loss, list(names.values()), retain_graph=True)
        for name, gradient in zip(names, gradients, strict=True):
            sums[name] += gradient / steps
        added = sum((correction.tensors()[n] * p).sum() for n, p in names.items())
        (loss + added).backward()
        optimizer.step()
    return classifier.trained(plan), sums


def test_every_step_is_corrected_and_the_server_reads_off_the_mean_gradient(
    classifier, adapter, correction
):
    plan = plan_for(adapter, (2, 0), scaling=SCALING, local_epochs=3)
    expected, gradients = by_hand(classifier, adapter, plan, correction, steps=3)

    result = train(classifier, adapter, plan, ROWS, SGD, seed=1, correction=correction)

    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(result.adapter.tensors()[name], tensor, rtol=1e-4, atol=1e-5)
    update = ClientUpdate(0, 5, plan, adapter, result.adapter, steps=result.steps)
    variates = ControlVariates()
    variates.correction = lambda *_: correction
    own = variates.after(update, adapter, SGD)
    for name, gradient in gradients.items():
        rows = own[name][[2, 0]] if name.startswith("lora_A") else own[name]
        rows = rows[:, [2, 0]] if name.startswith("lora_B") else rows
        torch.testing.assert_close(rows, gradient, rtol=2e-2, atol=2e-3)
    assert own[f"lora_A/{WIDE}"][1].isnan().all()  # never trained


def test_what_is_not_trained_stays(classifier, adapter, correction):
    plan = plan_for(adapter, (2, 0), head="frozen", local_epochs=2)
    modules = {name: replace(m, factors="B") for name, m in plan.modules.items()}
    only_B = correction.map(lambda f: f.only("B")).with_head({})

    train(classifier, adapter, replace(plan, modules=modules), ROWS, SGD, 1, correction=only_B)

    for name, (lora_A, lora_B) in classifier.trainable_factors().items():
        sent = adapter.modules[name].select((2, 0))
        assert torch.equal(lora_A, sent.lora_A)
        assert not torch.equal(lora_B, sent.lora_B)
    assert all(torch.equal(t, adapter.head[n]) for n, t in classifier.head_state().items())
