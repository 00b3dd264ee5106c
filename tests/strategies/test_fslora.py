"""FSLoRA: the sketch, its factor in the forward pass, and the mean over all participants."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from driving import MAX_RANK, Client, merge, noise, strategy_named, update_of
from training_factories import LABELS, TINY, random_adapter, random_rows

from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.training.classifier import ClassifierSpec, LoraClassifier

CLIENTS = [Client(rank, n, i) for i, (rank, n) in enumerate([(1, 10), (3, 25), (2, 7)])]
WIDE = "encoder.layer.1.intermediate.dense"  # (48, 32)


class TestTheSketch:
    def test_has_the_budget_of_components_and_its_factor(self):
        strategy = strategy_named("fslora")
        for client in CLIENTS:
            for module in strategy.plan(client.profile, 1).modules.values():
                assert module.held == module.trainable
                assert len(module.held) == client.rank
                assert module.gain == MAX_RANK / client.rank

    def test_is_drawn_anew_for_each_round_client_and_module(self):
        strategy = strategy_named("fslora")
        sketches = {
            (t, p, name): module.held
            for t in range(1, 9)
            for p in range(4)
            for name, module in strategy.plan(Client(2, 10, p).profile, t).modules.items()
        }
        by_round = {sketches[t, 0, "query"] for t in range(1, 9)}
        by_client = {sketches[1, p, "query"] for p in range(4)}
        assert len(by_round) > 2
        assert len(by_client) > 1
        assert any(sketches[t, 0, "query"] != sketches[t, 0, "dense"] for t in range(1, 9))

    def test_is_the_identity_in_expectation(self):
        strategy, rounds = strategy_named("fslora"), 2000
        drawn = Counter(
            i
            for t in range(1, rounds + 1)
            for i in strategy.plan(Client(3, 10, 0).profile, t).modules["query"].held
        )
        # Four standard deviations of a share of 3/4 over 2000 rounds, times 4/3.
        for i in range(MAX_RANK):
            assert drawn[i] / rounds * MAX_RANK / 3 == pytest.approx(1, abs=0.052)


@pytest.fixture(scope="module")
def model() -> LoraClassifier:
    return LoraClassifier(ClassifierSpec(TINY, LABELS, target_modules=(WIDE,), seed=7))


class TestTheForwardPass:
    def loss(self, model, adapter, gain, scaling=0.5):
        held = tuple(range(adapter.modules[WIDE].rank))
        model.load(adapter, TrainPlan({WIDE: ModulePlan(held, held, scaling, gain=gain)}))
        model.eval()
        rows = random_rows(6, seed=2)
        loss = model.loss(model.batch(rows, np.arange(6)))
        loss.backward()
        lora_A, lora_B = model.trainable_factors()[WIDE]
        return loss.item(), lora_A.grad.clone(), lora_B.grad.clone()

    def test_is_of_the_amplified_product_and_so_are_its_gradients(self, model):
        adapter = random_adapter(model, 3, seed=4)
        amplified = replace(adapter, modules={WIDE: adapter.modules[WIDE].scale(4.0)})

        loss, grad_A, grad_B = self.loss(model, adapter, gain=4.0)
        expected, of_A, of_B = self.loss(model, amplified, gain=1.0)

        assert loss == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(grad_A, of_A)
        torch.testing.assert_close(grad_B, 4.0 * of_B)  # d/dB of s g B A
        assert loss != pytest.approx(self.loss(model, adapter, gain=1.0)[0], rel=1e-3)

    def test_leaves_what_travels_alone(self, model):
        adapter = random_adapter(model, 3, seed=4)
        plan = TrainPlan({WIDE: ModulePlan((0, 1, 2), (0, 1, 2), 0.5, gain=4.0)})
        model.load(adapter, plan)
        trained = model.trained(plan).modules[WIDE]
        assert torch.equal(trained.lora_A, adapter.modules[WIDE].lora_A)
        assert torch.equal(trained.lora_B, adapter.modules[WIDE].lora_B)


def test_the_mean_of_changes_is_over_all_participants():
    strategy = strategy_named("fslora")
    updates = [update_of(strategy, client, noise) for client in CLIENTS]

    after = merge(strategy, updates)

    for name, before in strategy.global_adapter.modules.items():
        a, b = before.lora_A.double().numpy(), before.lora_B.double().numpy()
        new_a, new_b = a.copy(), b.copy()
        for update in updates:
            share, theirs = update.num_examples / 42, update.adapter.modules[name]
            for place, i in enumerate(update.plan.modules[name].held):
                new_a[i] += share * (theirs.lora_A[place].double().numpy() - a[i])
                new_b[:, i] += share * (theirs.lora_B[:, place].double().numpy() - b[:, i])
        np.testing.assert_allclose(after[name].lora_A, new_a, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(after[name].lora_B, new_b, rtol=1e-5, atol=1e-6)


def test_only_the_sketch_travels():
    head = 4 * (3 * 7 + 3)
    down, up = strategy_named("fslora").payload_bytes(Client(2, 10, 0).profile)
    assert down == up == 4 * 2 * (7 + 5 + 6 + 9) + head
