import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowrank_factories import IN, OUT, random_factors

from hafl_app.lowrank.change import (
    change_of,
    change_size,
    clip_factors,
    norm_bound,
    shrink_change,
    total_norm,
)
from hafl_app.lowrank.factors import Adapter, LoraFactors

RATIO = 10.0
HONEST = [0.7, 1.0, 1.1, 1.3, 0.9, 2.0, 1.2]


def adapter(seed, rank=3, dtype=torch.float32):
    modules = {
        "query": random_factors(rank, seed, dtype=dtype),
        "dense": random_factors(rank + 1, seed + 1, OUT - 2, IN + 5, dtype=dtype),
    }
    return Adapter(modules, {"weight": random_factors(2, seed + 2, dtype=dtype).lora_A})


def numbers(a):
    """Return all numbers of an adapter as one vector, the oracle's view."""
    tensors = [t for f in a.modules.values() for t in (f.lora_A, f.lora_B)]
    return torch.cat([t.double().flatten() for t in [*tensors, *a.head.values()]])


def change_norm(after, before):
    return total_norm(change_of(after, before))


class TestChangeNorm:
    def test_is_that_of_all_numbers_in_one_vector(self):
        after, before = adapter(0), adapter(9)
        expected = (numbers(after) - numbers(before)).norm()
        assert change_norm(after, before) == pytest.approx(float(expected), rel=1e-12)

    @pytest.mark.parametrize("part", ["lora_A", "lora_B", "head"])
    def test_every_part_counts(self, part):
        before = adapter(0)
        modules, head = dict(before.modules), dict(before.head)
        query = modules["query"]
        if part == "head":
            head["weight"] = head["weight"] + 1
        elif part == "lora_A":
            modules["query"] = LoraFactors(query.lora_A + 1, query.lora_B)
        else:
            modules["query"] = LoraFactors(query.lora_A, query.lora_B + 1)
        count = {"lora_A": 3 * IN, "lora_B": OUT * 3, "head": 2 * IN}[part]
        # A float32 number plus 1, rounded: the change is 1 to about 1e-7.
        norm = change_norm(Adapter(modules, head), before)
        assert norm == pytest.approx(math.sqrt(count), rel=1e-5)

    def test_the_largest_float32_numbers_have_a_finite_norm(self):
        before = adapter(0)
        huge = before.map(lambda f: LoraFactors(f.lora_A * 0 + 3e38, f.lora_B * 0 - 3e38))
        assert math.isfinite(change_norm(huge, before))

    def test_small_changes_of_large_numbers_do_not_vanish(self):
        before = adapter(0).map(lambda f: LoraFactors(f.lora_A * 0 + 1e4, f.lora_B))
        after = before.map(lambda f: LoraFactors(f.lora_A * 0 + (1e4 + 2**-9), f.lora_B))
        entries = 3 * IN + 4 * (IN + 5)
        # 1e4 lies between 2^13 and 2^14, where float32 numbers are 2^-10 apart.
        assert change_norm(after, before) == pytest.approx(2**-9 * math.sqrt(entries), rel=1e-12)

    def test_other_ranks_are_refused_and_not_broadcast(self):
        one = Adapter({"query": random_factors(1, 3)})
        with pytest.raises(ValueError, match=r"lora_A/query: shape \(3, 7\), expected \(1, 7\)"):
            change_norm(Adapter({"query": random_factors(3, 3)}), one)

    def test_other_modules_are_refused(self):
        with pytest.raises(ValueError, match=r"differ in \['head/weight'\]"):
            change_norm(adapter(0), Adapter(adapter(0).modules))


class TestChangeSize:
    def test_does_not_grow_with_the_rank(self):
        sizes = []
        for rank in (2, 4, 8):
            before = adapter(rank, rank, torch.float64)
            after = before.map(lambda f: LoraFactors(f.lora_A + 0.1, f.lora_B - 0.1))
            after = after.with_head({n: t + 0.1 for n, t in before.head.items()})
            sizes.append(change_size(after, before, dict.fromkeys(before.modules, 1.0)))
        assert sizes == pytest.approx([0.1, 0.1, 0.1], rel=1e-12)

    def test_scaling_is_unfolded_from_lora_b_alone(self):
        before = adapter(0, dtype=torch.float64)
        scaling = {"query": 8.0, "dense": 0.5}
        after = Adapter(
            {
                n: LoraFactors(f.lora_A + 0.1, f.lora_B + 0.1 * scaling[n])
                for n, f in before.modules.items()
            },
            {n: t - 0.1 for n, t in before.head.items()},
        )
        assert change_size(after, before, scaling) == pytest.approx(0.1, rel=1e-12)

    def test_the_largest_float32_numbers_have_a_finite_size(self):
        before = adapter(0)
        huge = before.map(lambda f: LoraFactors(f.lora_A, f.lora_B * 0 - 3e38))
        assert math.isfinite(change_size(huge, before, dict.fromkeys(before.modules, 0.01)))

    def test_an_adapter_without_numbers_has_not_changed(self):
        assert change_size(Adapter({}), Adapter({}), {}) == 0


class TestNormBound:
    def test_is_the_median_and_robust_deviations(self):
        # Median 1.1; absolute deviations 0.4 0.1 0 0.2 0.2 0.9 0.1, their median 0.2.
        assert norm_bound(HONEST, RATIO) == pytest.approx(1.1 + 10 * 1.4826 * 0.2)

    def test_clients_that_agree_leave_room_for_the_others(self):
        assert norm_bound([1.0] * 9, RATIO) == pytest.approx(3.0)

    @pytest.mark.parametrize("count", range(5))
    def test_fewer_than_five_have_no_bound(self, count):
        assert norm_bound([1.0, 1.0, 1.0, 1e6][:count], RATIO) == math.inf

    def test_five_have_a_bound(self):
        assert norm_bound([1.0, 1.0, 1.0, 1.0, 1e6], RATIO) < 1e6

    @given(
        honest=st.lists(st.floats(0.1, 3), min_size=3, max_size=8),
        wrong=st.lists(st.floats(1e4, 1e300), max_size=2),
    )
    def test_two_wrong_norms_of_five_or_more_stay_outside(self, honest, wrong):
        bound = norm_bound(honest + wrong, RATIO)
        if len(honest + wrong) >= 5 and wrong:
            # The median and the deviation are at most the honest maximum, 3.
            assert bound <= 3 + RATIO * 1.4826 * 3 < min(wrong)

    def test_a_majority_that_changed_nothing_sets_no_bound(self):
        assert norm_bound([0.0] * 6 + [1.0, 1.1, 1.2], RATIO) == math.inf

    def test_with_a_majority_of_zeros_the_others_are_judged_among_themselves(self):
        moved = [1.0, 1.0, 1.0, 1.0, 1e6]
        assert norm_bound([0.0] * 6 + moved, RATIO) == norm_bound(moved, RATIO) < 1e6

    def test_few_zeros_count_as_norms(self):
        assert norm_bound([0.0, *HONEST], RATIO) != norm_bound(HONEST, RATIO)


class TestClipFactors:
    def test_nothing_exceeds_the_limit_and_the_rest_stays(self):
        factors = clip_factors([1.0, 2.0, 3.0, 50.0], 1.2)
        # Median 2.5, limit 3.
        assert factors == pytest.approx([1, 1, 1, 3 / 50])
        assert factors[:2] == [1.0, 1.0]

    def test_a_ratio_below_one_clips_the_median_too(self):
        assert clip_factors([1.0, 2.0, 4.0], 0.5) == pytest.approx([1.0, 0.5, 0.25])

    @pytest.mark.parametrize("norms", [[], [0.0, 0.0, 7.0], [0.0]])
    def test_without_a_usual_norm_nothing_is_clipped(self, norms):
        assert clip_factors(norms, 2.0) == [1.0] * len(norms)


class TestShrinkChange:
    @given(factor=st.floats(0, 1))
    def test_goes_part_of_the_way(self, factor):
        after, before = adapter(0), adapter(9)
        expected = numbers(before) + factor * (numbers(after) - numbers(before))
        shrunk = shrink_change(after, before, factor)
        torch.testing.assert_close(numbers(shrunk), expected, rtol=1e-6, atol=1e-6)
        assert shrunk.modules["dense"].lora_B.dtype == torch.float32
        assert set(shrunk.head) == {"weight"}

    def test_the_whole_way_is_the_adapter_bit_for_bit(self):
        # Small numbers that came from large ones would vanish in a sum.
        after, before = adapter(0), adapter(9).map(lambda f: LoraFactors(f.lora_A * 1e30, f.lora_B))
        assert torch.equal(numbers(shrink_change(after, before, 1.0)), numbers(after))

    def test_no_way_is_the_adapter_before_bit_for_bit(self):
        after, before = adapter(0), adapter(9)
        assert torch.equal(numbers(shrink_change(after, before, 0.0)), numbers(before))

    def test_clipped_changes_have_the_norm_that_was_asked_for(self):
        before = adapter(9)
        updates = [shrink_change(adapter(0), before, f) for f in (0.1, 0.2, 1.0)]
        norms = [change_norm(u, before) for u in updates]
        factors = clip_factors(norms, 1.5)
        clipped = [shrink_change(u, before, f) for u, f in zip(updates, factors, strict=True)]
        assert change_norm(clipped[2], before) == pytest.approx(1.5 * norms[1], rel=1e-6)

    def test_other_ranks_are_refused_and_not_broadcast(self):
        with pytest.raises(ValueError, match="lora_A"):
            shrink_change(
                Adapter({"query": random_factors(3, 3)}),
                Adapter({"query": random_factors(1, 3)}),
                0.5,
            )
