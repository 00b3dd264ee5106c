"""FedRot-LoRA: trained factors are rotated toward those that were sent, then averaged."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from driving import Client, dense, merge, noise, strategy_named, update_of
from numpy.testing import assert_allclose
from scipy.linalg import orthogonal_procrustes, polar
from training_factories import random_rows
from training_law import OPTIONS, SPEC, profiles_for, strategy_on

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan_parts.alignment import Alignment
from hafl_app.training.alignment import aligned
from hafl_app.training.classifier import LoraClassifier
from hafl_app.training.local import train

CLIENTS = [Client(3, n, i) for i, n in enumerate((10, 25, 7))]
SHARES = [10 / 42, 25 / 42, 7 / 42]


@pytest.fixture(scope="module")
def model() -> LoraClassifier:
    return LoraClassifier(SPEC)


def oracle(trained, sent, factor, weight):
    """Return ``(A, B)`` after the alignment, in numpy from the equation."""
    A, B, A0, B0 = (
        f.double().numpy() for f in (trained.lora_A, trained.lora_B, sent.lora_A, sent.lora_B)
    )
    R, _ = orthogonal_procrustes(A.T, A0.T) if factor == "A" else orthogonal_procrustes(B, B0)
    assert np.linalg.det(R) > 0
    R, _ = polar((1 - weight) * np.eye(len(R)) + weight * R)
    return R.T @ A, B @ R


def test_plans_align_in_turns_but_not_in_the_first_round():
    def alignments(*overrides):
        strategy = strategy_named("fedrot_lora", *overrides)
        return [strategy.plan(CLIENTS[0].profile, r).align for r in (1, 2, 3, 4)]

    A, B = Alignment("A", 0.5), Alignment("B", 0.5)
    assert alignments() == [None, A, B, A]
    assert alignments("strategy.align=B") == [None, B, B, B]
    assert alignments("strategy.align=A", "strategy.rotation_weight=1") == [
        None,
        *[Alignment("A", 1.0)] * 3,
    ]
    assert alignments("strategy.rotation_weight=0") == [None] * 4


@pytest.mark.parametrize("server_round", [2, 3])
def test_the_mean_is_of_aligned_factors(server_round):
    strategy = strategy_named("fedrot_lora", "strategy.rotation_weight=0.7")
    updates = [update_of(strategy, c, noise, server_round) for c in CLIENTS]
    align = strategy.plan(CLIENTS[0].profile, server_round).align
    uploads = [replace(u, adapter=aligned(u.adapter, u.sent, align)) for u in updates]

    after = merge(strategy, uploads)

    for name in after:
        pairs = [
            oracle(u.adapter.modules[name], u.sent.modules[name], align.factor, 0.7)
            for u in updates
        ]
        A, B = (sum(w * p[i] for w, p in zip(SHARES, pairs, strict=True)) for i in (0, 1))
        assert_allclose(after[name].lora_A[:3], A, atol=1e-5)
        assert_allclose(after[name].lora_B[:, :3], B, atol=1e-5)
        plain = merge(strategy, updates)[name]
        assert np.abs(dense(after[name]) - dense(plain)).max() > 1e-3


def test_clients_that_differ_by_a_rotation_alone_are_averaged_without_loss():
    strategy = strategy_named("fedrot_lora", "strategy.rotation_weight=1")
    updates = [update_of(strategy, replace(c, noise_seed=5), noise, 2) for c in CLIENTS]

    def turned(update, degrees):
        cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        R = torch.tensor([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], dtype=torch.float32)
        modules = {
            n: LoraFactors(R.T @ f.lora_A, f.lora_B @ R) for n, f in update.adapter.modules.items()
        }
        return replace(update, adapter=Adapter(modules, update.adapter.head))

    updates = [turned(u, d) for u, d in zip(updates, (0, 80, -60), strict=True)]
    align = strategy.plan(CLIENTS[0].profile, 2).align
    uploads = [replace(u, adapter=aligned(u.adapter, u.sent, align)) for u in updates]

    after, unaligned = merge(strategy, uploads), merge(strategy, updates)

    for name, factors in after.items():
        one = dense(updates[0].adapter.modules[name])
        assert_allclose(dense(factors.select(range(3))), one, atol=1e-5)
        assert np.abs(dense(unaligned[name].select(range(3))) - one).max() > 0.1


class TestClient:
    """The step in the real training."""

    def trained(self, model, plan, sent):
        return train(model, sent, plan, random_rows(12), OPTIONS, seed=1)

    @pytest.mark.parametrize("server_round", [2, 3])
    def test_uploads_the_same_product_in_rotated_factors(self, model, server_round):
        strategy = strategy_on(model, "fedrot_lora", "averaged")
        plan = strategy.plan(profiles_for(strategy)[0], server_round)
        sent = strategy.dispatch(plan)

        plain = self.trained(model, replace(plan, align=None), sent).adapter
        got = self.trained(model, plan, sent).adapter

        for name, factors in got.modules.items():
            A, B = oracle(plain.modules[name], sent.modules[name], plan.align.factor, 0.5)
            assert_allclose(factors.lora_A, A, atol=1e-5)
            assert_allclose(factors.lora_B, B, atol=1e-5)
            assert (factors.lora_A - plain.modules[name].lora_A).abs().max() > 1e-4
            assert_allclose(
                factors.delta_weight(), plain.modules[name].delta_weight(), atol=1e-5, rtol=1e-5
            )
        assert all(torch.equal(got.head[n], tensor) for n, tensor in plain.head.items())

    def test_leaves_a_module_of_one_factor_as_it_is(self, model):
        strategy = strategy_on(model, "fedrot_lora", "averaged")
        plan = strategy.plan(profiles_for(strategy)[0], 2)
        plan = replace(plan, modules={n: replace(m, factors="B") for n, m in plan.modules.items()})
        sent = strategy.dispatch(plan)

        plain = self.trained(model, replace(plan, align=None), sent).adapter
        got = self.trained(model, plan, sent).adapter

        for name, factors in got.modules.items():
            assert torch.equal(factors.lora_B, plain.modules[name].lora_B)
