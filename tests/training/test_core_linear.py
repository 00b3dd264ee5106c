"""Training of cores in the model: what moves, what the forward pass adds, what is left behind."""

import copy

import pytest
import torch
from training_factories import random_adapter, random_rows
from training_law import OPTIONS, SPEC, strategy_on

from hafl_app.lowrank.cores import with_cores
from hafl_app.lowrank.factors import Adapter
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.training.classifier import LoraClassifier
from hafl_app.training.core_linear import CoreLinear
from hafl_app.training.local import train
from hafl_app.training.lora_layers import TRAINABLE, AdapterFitError
from hafl_app.wire.node_profile import NodeProfile


@pytest.fixture(scope="module")
def model() -> LoraClassifier:
    return LoraClassifier(SPEC)


def asked(model, name, rank=2):
    strategy = strategy_on(model, name, "averaged")
    plan = strategy.plan(NodeProfile(0, 1, rank, 12, "cpu"), 1)
    return strategy, plan, strategy.dispatch(plan)


def logits(model, rows):
    model.eval()
    with torch.no_grad():
        return model.predictions(model.batch(rows, torch.arange(4).numpy()))[0]


def whole(strategy, plan, cores):
    bases = strategy.bases()
    return {
        n: with_cores(f, bases[n].select(plan.modules[n].held)) for n, f in cores.modules.items()
    }


@pytest.mark.parametrize("name", ["fed_sb", "ravan"])
def test_the_forward_pass_is_that_of_the_factors_the_cores_make(model, name):
    strategy, plan, sent = asked(model, name)
    rows = random_rows(12)
    model.load(sent, plan)
    got = logits(model, rows)
    model.load_whole(Adapter(whole(strategy, plan, sent), sent.head))
    torch.testing.assert_close(got, logits(model, rows), atol=1e-5, rtol=1e-4)


def test_a_step_of_sgd_is_that_of_the_core_in_the_equation(model):
    """R <- R - l B^T (dL/d lora_B), from the gradient of plain LoRA."""
    strategy, plan, sent = asked(model, "fed_sb")
    rows, factors = random_rows(4), whole(strategy, plan, sent)
    plain = TrainPlan(
        {
            n: ModulePlan(m.held, m.trainable, m.scaling, factors="B")
            for n, m in plan.modules.items()
        }
    )
    model.load(Adapter(factors, sent.head), plain)
    model.loss(model.batch(rows, torch.arange(4).numpy())).backward()
    gradients = {n: b.grad.clone() for n, (_, b) in model.trainable_factors().items()}

    model.load(sent, plan)
    model.clear_gradients()
    model.loss(model.batch(rows, torch.arange(4).numpy())).backward()

    for name, (_, core) in model.trainable_factors().items():
        basis = strategy.bases()[name].lora_B[:, : len(plan.modules[name].held)]
        torch.testing.assert_close(core.grad, basis.T @ gradients[name], atol=1e-6, rtol=1e-3)
        assert core.grad.abs().max() > 0


def test_what_comes_back_is_what_the_model_has_learned(model):
    strategy, plan, sent = asked(model, "ravan", rank=2)
    rows = random_rows(12)
    result = train(model, sent, plan, rows, OPTIONS, seed=1)
    learned = logits(model, rows)
    after = {
        n: f.replace(plan.modules[n].trainable, result.adapter.modules[n])
        for n, f in sent.modules.items()
    }
    model.load_whole(Adapter(whole(strategy, plan, Adapter(after)), result.adapter.head))
    torch.testing.assert_close(logits(model, rows), learned, atol=1e-5, rtol=1e-4)


def test_trained_factors_of_the_heads_are_part_of_what_is_uploaded(model):
    _, plan, sent = asked(model, "ravan", rank=2)
    model.load(sent, plan)
    assert all((scales == 1).all() for scales in model.trainable_scales())
    for scales in model.trainable_scales():
        scales.data.fill_(3.0)
    for name, factors in model.trained(plan).modules.items():
        before = sent.modules[name].select(plan.modules[name].trainable_slots)
        torch.testing.assert_close(factors.lora_B, 3 * before.lora_B)


def test_the_factors_of_heads_are_trained_where_the_plan_says_so(model):
    _, plan, sent = asked(model, "ravan", rank=2)
    train(model, sent, plan, random_rows(12), OPTIONS, seed=1)
    assert model.trainable_scales()
    assert all((scales != 1).all() for scales in model.trainable_scales())
    _, plan, sent = asked(model, "fed_sb")
    train(model, sent, plan, random_rows(12), OPTIONS, seed=1)
    assert not model.trainable_scales()
    for layer in model.layers.values():
        assert (layer.lora_B[TRAINABLE].scales == 1).all()


def test_the_bases_stay_and_the_next_client_finds_plain_factors(model):
    strategy, plan, sent = asked(model, "fed_sb")
    train(model, sent, plan, random_rows(12), OPTIONS, seed=1)
    for name, layer in model.layers.items():
        held = strategy.bases()[name].select(plan.modules[name].held)
        assert isinstance(layer.lora_B[TRAINABLE], CoreLinear)
        assert torch.equal(layer.lora_B[TRAINABLE].basis, held.lora_B)
        assert torch.equal(layer.lora_A[TRAINABLE].weight, held.lora_A)
    usual = random_adapter(model, 3, seed=2)
    model.load_whole(usual)
    fresh = LoraClassifier(SPEC)
    fresh.load_whole(usual)
    rows = random_rows(12)
    assert torch.equal(logits(model, rows), logits(fresh, rows))


def test_factors_in_place_of_cores_are_refused(model):
    strategy, plan, sent = asked(model, "fed_sb")
    wrong = Adapter(whole(strategy, plan, sent), sent.head)
    with pytest.raises(AdapterFitError, match=r"factors of a \(48, 32\) weight .* \(2, 0\)"):
        model.load(wrong, copy.deepcopy(plan))
