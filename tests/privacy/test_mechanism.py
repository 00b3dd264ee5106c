"""Clipping, noise, and what a client may upload under local privacy."""

import hashlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.component_choice import ComponentChoice
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.plan_parts.tail_pruning import TailPruning
from hafl_app.privacy.mechanism import (
    NoiseSource,
    PrivacyError,
    PrivacyOptions,
    add_noise,
    check_local_plan,
    clipped_change,
    new_noise_key,
    privatize_upload,
    trained_part,
)

OUT, IN = 7, 5  # never square: a transposed factor must fail, not pass
NOISE = NoiseSource("a key for tests").generator(3, "test")


def adapter(seed: int, *, rank: int = 3, scale: float = 1.0) -> Adapter:
    """Two modules of different shape and rank, and a head."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator)

    return Adapter(
        {
            "query": LoraFactors(random(rank, IN), random(OUT, rank)),
            "dense": LoraFactors(random(rank + 1, 9), random(6, rank + 1)),
        },
        {"weight": random(4, OUT), "bias": random(4)},
    )


def flat(value: Adapter) -> torch.Tensor:
    """Every number of an adapter, factors and head, as one vector."""
    factors = [t.flatten() for f in value.modules.values() for t in (f.lora_A, f.lora_B)]
    return torch.cat([*factors, *(t.flatten() for t in value.head.values())]).double()


def plus(left: Adapter, right: Adapter) -> Adapter:
    return Adapter(
        {
            n: LoraFactors(f.lora_A + right.modules[n].lora_A, f.lora_B + right.modules[n].lora_B)
            for n, f in left.modules.items()
        },
        {n: t + right.head[n] for n, t in left.head.items()},
    )


class TestClippedChange:
    def test_a_large_change_is_scaled_to_the_bound_as_a_whole(self):
        before, after = adapter(1), adapter(2)

        clipped = flat(clipped_change(after, before, 0.25))

        whole = flat(after) - flat(before)
        assert whole.norm() > 1
        torch.testing.assert_close(clipped, 0.25 * whole / whole.norm(), atol=1e-12, rtol=0)

    def test_a_small_change_stays_as_it_is(self):
        before, after = adapter(1), adapter(2)
        whole = flat(after) - flat(before)

        clipped = flat(clipped_change(after, before, 1.001 * float(whole.norm())))

        assert torch.equal(clipped, whole)

    def test_the_head_counts_in_the_norm(self):
        before = adapter(1)
        after = before.with_head({n: t + 10 for n, t in before.head.items()})

        assert flat(clipped_change(after, before, 0.5)).norm() == pytest.approx(0.5, rel=1e-12)

    def test_the_bound_holds_beside_large_values(self):
        # In float32, 1e4 + 0.001 is off by up to 5e-4: the change must never pass through it.
        before = adapter(1, scale=1e4)
        after = plus(before, adapter(2))

        assert flat(clipped_change(after, before, 1e-3)).norm() <= 1e-3 * (1 + 1e-12)

    def test_no_change_is_no_change(self):
        assert flat(clipped_change(adapter(1), adapter(1), 1.0)).norm() == 0

    def test_other_shapes_are_refused_by_name(self):
        with pytest.raises(PrivacyError, match=r"lora_A/dense: shape \(3, 9\), expected \(4, 9\)"):
            clipped_change(adapter(1, rank=2), adapter(1, rank=3), 1.0)

    def test_a_change_that_is_not_finite_is_refused(self):
        broken = adapter(1).with_head({"weight": torch.full((4, OUT), torch.nan)})
        whole = adapter(1).with_head({"weight": torch.zeros(4, OUT)})

        with pytest.raises(PrivacyError, match="norm nan"):
            clipped_change(broken, whole, 1.0)


class TestNoise:
    def test_it_is_standard_normal(self):
        noise = NOISE.normal("x", (400, 501))

        # Standard errors at 200,400 draws: mean 0.0022, standard deviation 0.0016.
        assert float(noise.mean()) == pytest.approx(0, abs=0.009)
        assert float(noise.std()) == pytest.approx(1, abs=0.007)
        # P(|x| > 1.96) = 0.05, P(|x| > 3) = 0.0027, and no draw may be infinite.
        assert float((noise.abs() > 1.959964).double().mean()) == pytest.approx(0.05, abs=0.002)
        assert float((noise.abs() > 3).double().mean()) == pytest.approx(0.0027, abs=0.0005)
        assert noise.isfinite().all()

    @pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
    def test_the_most_extreme_bits_are_finite(self, byte, monkeypatch):
        shake = SimpleNamespace(digest=lambda count: count * byte)
        monkeypatch.setattr(hashlib, "shake_256", lambda _: shake)

        # The quantile of 2^-53: scipy.stats.norm.ppf(2**-53) is -8.20954.
        assert NOISE.normal("x", (2, 3)).abs().max() == pytest.approx(8.20954, abs=1e-4)

    def test_tensors_of_other_names_rounds_labels_and_keys_get_independent_noise(self):
        source = NoiseSource("key")
        draws = [
            generator.normal(name, (2000,))
            for generator, name in (
                (source.generator(1, "a"), "x"),
                (source.generator(1, "a"), "y"),
                (source.generator(2, "a"), "x"),
                (source.generator(1, "b"), "x"),
                (source.generator(1, "a", adapter(1)), "x"),
                (source.generator(1, "a", adapter(2)), "x"),
                (NoiseSource("other").generator(1, "a"), "x"),
            )
        ]

        correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
        assert correlations.abs().max() < 0.1  # 4.5 standard errors

    def test_the_same_key_draws_the_same_noise_for_the_same_release(self):
        draws = [NoiseSource("key").generator(4, "a", adapter(1)) for _ in range(2)]

        assert torch.equal(*(g.normal("x", (3, 2)) for g in draws))

    def test_one_changed_number_draws_other_noise(self):
        changed = adapter(1)
        changed.head["bias"][2] += 1e-6

        draws = [NoiseSource("key").generator(4, "a", c) for c in (adapter(1), changed)]

        assert not torch.isclose(*(g.normal("x", (50,)) for g in draws)).any()

    def test_the_order_of_tensors_does_not_matter(self):
        one = adapter(1)
        other = Adapter(dict(reversed(one.modules.items())), dict(reversed(one.head.items())))

        noisy = [add_noise(a, 1.0, NoiseSource("key").generator(1, "a", a)) for a in (one, other)]

        assert torch.equal(noisy[0].modules["query"].lora_B, noisy[1].modules["query"].lora_B)

    @pytest.mark.parametrize("shape", [(), (0, 4), (3, 0), (2, 1, 3)])
    def test_every_shape_gets_noise(self, shape):
        assert NOISE.normal("x", shape).shape == shape

    def test_a_missing_key_is_refused(self):
        with pytest.raises(PrivacyError, match="noise key is empty"):
            NoiseSource(PrivacyOptions().noise_key)

    def test_keys_are_fresh_unless_seeded(self):
        assert new_noise_key(None) != new_noise_key(None)
        assert len(new_noise_key(None)) == 64  # 256 bits in hexadecimal
        assert new_noise_key(7) == new_noise_key(7) != new_noise_key(8)

    def test_the_key_is_not_shown(self):
        assert "hush" not in repr(PrivacyOptions(noise_key="hush"))
        assert "seed" not in repr(NOISE)


class TestLocalPrivacy:
    OPTIONS = PrivacyOptions("local_dp", clip_norm=0.5, noise_multiplier=1.6)

    def test_every_number_gets_noise_of_the_stated_scale(self):
        before = Adapter(
            {
                "query": LoraFactors(torch.zeros(40, 150), torch.zeros(130, 40)),
                "dense": LoraFactors(torch.zeros(70, 90), torch.zeros(80, 70)),
            },
            {"weight": torch.zeros(90, 80)},
        )

        upload = privatize_upload(before, before, self.OPTIONS, NOISE)

        # z C = 0.8; at least 5,200 numbers a tensor: the standard error is at most 0.0079.
        tensors = [t for f in upload.modules.values() for t in (f.lora_A, f.lora_B)]
        for tensor in (*tensors, *upload.head.values()):
            assert float(tensor.double().std()) == pytest.approx(0.8, abs=0.035)
            assert float(tensor.double().mean()) == pytest.approx(0, abs=0.045)

    def test_the_change_is_clipped_before_the_noise(self):
        before, after = adapter(1), adapter(2)
        still = privatize_upload(before, before, self.OPTIONS, NOISE)

        upload = privatize_upload(after, before, self.OPTIONS, NOISE)

        # The same noise on both: what is left is the clipped change, in float32.
        moved = flat(upload) - flat(still)
        torch.testing.assert_close(
            moved, flat(clipped_change(after, before, 0.5)), atol=1e-5, rtol=0
        )
        assert float(moved.norm()) == pytest.approx(0.5, abs=1e-5)

    def test_the_upload_is_float32(self):
        upload = privatize_upload(adapter(2), adapter(1), self.OPTIONS, NOISE)

        assert {t.dtype for t in upload.head.values()} == {torch.float32}
        assert upload.modules["dense"].lora_A.dtype == torch.float32

    def test_the_trained_part_is_what_is_uploaded(self):
        received = adapter(1)
        plan = TrainPlan(
            {"query": ModulePlan((1, 4, 2), (2, 1)), "dense": ModulePlan((0, 1, 2, 3), (1,))}
        )

        part = trained_part(received, plan)

        expected = received.modules["query"].lora_A[[2, 0]]  # where components 2 and 1 are held
        assert torch.equal(part.modules["query"].lora_A, expected)
        assert part.modules["dense"].rank == 1
        assert part.head == received.head
        assert not trained_part(received, replace(plan, head="local")).head

    def test_a_factor_that_is_not_trained_gets_no_noise_and_counts_nothing_in_the_norm(self):
        modules = {
            n: ModulePlan(tuple(range(f.rank)), (1,), factors=factors)
            for (n, f), factors in zip(adapter(1).modules.items(), ("A", "B"), strict=True)
        }
        plan = TrainPlan(modules, head="frozen")
        before, after = (trained_part(adapter(seed), plan) for seed in (1, 2))
        (of_A, of_B) = (before.modules[name] for name in modules)
        quiet = replace(self.OPTIONS, noise_multiplier=1e-9, clip_norm=0.25)

        upload = privatize_upload(after, before, quiet, NOISE)

        assert (of_A.out_features, of_B.in_features) == (0, 0)
        assert {n: t.shape for n, t in upload.tensors().items()} == {
            n: t.shape for n, t in before.tensors().items()
        }
        # All of the bound is left to the trained numbers.
        assert float((flat(upload) - flat(before)).norm()) == pytest.approx(0.25, rel=1e-4)


class TestLocalPlans:
    PLAN = TrainPlan({"query": ModulePlan((0, 1), (0, 1))})

    def test_a_plan_of_factors_alone_is_accepted(self):
        check_local_plan(self.PLAN)
        check_local_plan(replace(self.PLAN, tail=TailPruning(0.9, 0.01, 1, prune=False)))

    def test_a_choice_by_private_data_is_refused(self):
        modules = {n: replace(m, budget=1) for n, m in self.PLAN.modules.items()}
        rule = ComponentChoice("contribution", "model")
        with pytest.raises(PrivacyError, match="the choice is uploaded without noise"):
            check_local_plan(replace(self.PLAN, modules=modules, choice=rule))

    def test_the_largest_numbers_of_a_change_are_refused(self):
        with pytest.raises(PrivacyError, match="which they are is not noised"):
            check_local_plan(replace(self.PLAN, upload="sparse", density=0.5))

    def test_importance_is_refused_by_name(self):
        with pytest.raises(PrivacyError, match=r"importance=smoothed.*strategy\.source=server"):
            check_local_plan(replace(self.PLAN, importance="smoothed"))

    def test_pruning_is_refused_with_the_setting(self):
        with pytest.raises(PrivacyError, match=r"rank.*strategy\.pruning=false"):
            check_local_plan(replace(self.PLAN, tail=TailPruning(0.9, 0.01, 1)))
