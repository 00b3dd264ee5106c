import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowrank_factories import IN, OUT, assert_same_bits, random_factors

from hafl_app.lowrank.components import ComponentSums
from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.robust import (
    RobustSums,
    robust_factors,
    robust_mean,
    robust_tensors,
)

RULES = ("median", "trimmed_mean")
TRIM = 0.2
RANK = 4
PREVIOUS = random_factors(RANK, 99, dtype=torch.float32)
CLIENTS = st.lists(
    st.sets(st.integers(0, RANK - 1)).map(sorted).flatmap(st.permutations),
    min_size=1,
    max_size=9,
)


def contributions_of(clients, seed):
    return [
        (random_factors(len(slots), seed + k, dtype=torch.float32), tuple(slots))
        for k, slots in enumerate(clients)
    ]


def reduce_by_hand(values, rule, trim_fraction=TRIM):
    """The definition for one coordinate: sort, cut, average."""
    ordered = sorted(values)
    count = len(ordered)
    if rule == "median":
        cut = (count - 1) // 2
    else:
        cut = max(1, math.floor(trim_fraction * count)) if count >= 3 else 0
    kept = ordered[cut : count - cut]
    return sum(kept) / len(kept)


def by_hand(contributions, component, rule):
    """Return (a_i, b_i) by plain loops, or None where no client trained it."""
    rows, columns = [], []
    for factors, slots in contributions:
        if component in slots:
            place = slots.index(component)
            rows.append(factors.lora_A[place].tolist())
            columns.append(factors.lora_B[:, place].tolist())
    if not rows:
        return None
    return [
        torch.tensor([reduce_by_hand(values, rule) for values in zip(*vectors, strict=True)])
        for vectors in (rows, columns)
    ]


@pytest.mark.parametrize("rule", RULES)
class TestBothRules:
    @given(clients=CLIENTS, seed=st.integers(0, 2**32 - 1))
    def test_each_component_is_reduced_over_those_who_trained_it(self, rule, clients, seed):
        contributions = contributions_of(clients, seed)

        result = robust_factors(contributions, PREVIOUS, rule, TRIM)

        for i in range(RANK):
            expected = by_hand(contributions, i, rule)
            if expected is None:
                assert_same_bits(result.select([i]), PREVIOUS.select([i]))
            else:
                torch.testing.assert_close(result.lora_A[i], expected[0])
                torch.testing.assert_close(result.lora_B[:, i], expected[1])

    @given(clients=CLIENTS, seed=st.integers(0, 2**32 - 1))
    def test_the_order_of_clients_does_not_change_a_bit(self, rule, clients, seed):
        contributions = contributions_of(clients, seed)
        shuffled = random.Random(seed).sample(contributions, len(contributions))
        assert_same_bits(
            robust_factors(shuffled, PREVIOUS, rule, TRIM),
            robust_factors(contributions, PREVIOUS, rule, TRIM),
        )

    @given(count=st.integers(1, 11), seed=st.integers(0, 2**32 - 1))
    def test_equal_clients_are_returned_bit_for_bit(self, rule, count, seed):
        same = random_factors(RANK, seed, dtype=torch.float32)
        result = robust_factors([(same, range(RANK))] * count, PREVIOUS, rule, TRIM)
        assert_same_bits(result, same)

    def test_one_or_two_contributors_give_their_mean(self, rule):
        alone, both, other = contributions_of([(3,), (1, 3), (0,)], seed=5)
        result = robust_factors([alone, both, other], PREVIOUS, rule, TRIM)
        mean = (alone[0].lora_B[:, 0] + both[0].lora_B[:, 1]) / 2
        torch.testing.assert_close(result.lora_B[:, 3], mean)
        torch.testing.assert_close(result.lora_A[1], both[0].lora_A[0])
        assert_same_bits(result.select([0]), other[0])
        assert_same_bits(result.select([2]), PREVIOUS.select([2]))

    def test_no_client_at_all_leaves_everything(self, rule):
        empty = random_factors(0, 1, dtype=torch.float32)
        assert_same_bits(robust_factors([], PREVIOUS, rule, TRIM), PREVIOUS)
        assert_same_bits(robust_factors([(empty, ())] * 3, PREVIOUS, rule, TRIM), PREVIOUS)

    def test_dtype_stays(self, rule):
        contributions = [(random_factors(RANK, k), range(RANK)) for k in range(3)]
        previous = random_factors(RANK, 9)
        assert robust_factors(contributions, previous, rule, TRIM).lora_A.dtype == torch.float64

    def test_the_largest_numbers_do_not_overflow(self, rule):
        huge = LoraFactors(torch.full((1, IN), 3e38), torch.full((OUT, 1), 3e38))
        result = robust_factors([(huge, (2,))] * 4, PREVIOUS, rule, TRIM)
        assert torch.equal(result.lora_A[2], huge.lora_A[0])

    @pytest.mark.parametrize("slots", [(0, 0), (0, 4), (0, -1), (0,), (0, 1, 2)])
    def test_slots_that_do_not_fit_are_refused(self, rule, slots):
        factors = random_factors(2, 1, dtype=torch.float32)
        with pytest.raises(ValueError, match=r"2 components need distinct indices in \[0, 4\)"):
            robust_factors([(factors, slots)], PREVIOUS, rule, TRIM)


def attacked(honest, kind):
    factors, slots = honest
    if kind == "sign flipped":
        return LoraFactors(-factors.lora_A, -factors.lora_B), slots
    sign = 1 if kind == "scaled" else -1
    return LoraFactors(sign * 1e6 * factors.lora_A, sign * 1e6 * factors.lora_B), slots


class TestBreakdown:
    # Ten clients hold the first components, five of them the last: mixed ranks.
    RANKS = (4, 2, 4, 2, 4, 2, 4, 2, 4, 3)

    def clients(self, seed):
        # All clients' values are near those of one adapter, as after a round from one start.
        start = random_factors(RANK, seed, dtype=torch.float32)
        noise = [random_factors(RANK, seed + 1 + k, dtype=torch.float32) for k in range(10)]
        return [
            (
                LoraFactors(
                    start.lora_A[:r] + 0.1 * n.lora_A[:r],
                    start.lora_B[:, :r] + 0.1 * n.lora_B[:, :r],
                ),
                tuple(range(r)),
            )
            for r, n in zip(self.RANKS, noise, strict=True)
        ]

    def inside(self, result, honest):
        """Whether each coordinate lies among the honest contributors' values."""
        for i in range(RANK):
            rows = torch.stack([f.lora_A[i] for f, slots in honest if i in slots])
            columns = torch.stack([f.lora_B[:, i] for f, slots in honest if i in slots])
            for got, values in ((result.lora_A[i], rows), (result.lora_B[:, i], columns)):
                if not ((got >= values.amin(0)) & (got <= values.amax(0))).all():
                    return False
        return True

    @pytest.mark.parametrize("kind", ["sign flipped", "scaled", "scaled and flipped"])
    @pytest.mark.parametrize("seed", range(5))
    def test_four_of_ten_do_not_move_the_median_out_of_the_honest_range(self, kind, seed):
        clients = self.clients(seed)
        # Two of the five holders of the last component, four of the ten of the first.
        wrong = {0, 1, 2, 3}
        honest = [c for k, c in enumerate(clients) if k not in wrong]
        mixed = [attacked(c, kind) if k in wrong else c for k, c in enumerate(clients)]

        assert self.inside(robust_factors(mixed, PREVIOUS, "median", TRIM), honest)

    def test_the_plain_mean_is_moved_by_the_same(self):
        clients = self.clients(0)
        mixed = [attacked(c, "scaled") if k < 4 else c for k, c in enumerate(clients)]
        sums = ComponentSums.zeros(PREVIOUS)
        for factors, slots in mixed:
            sums = sums.add(factors, slots, 1.0)
        assert not self.inside(sums.average_over_contributors(PREVIOUS), clients[4:])

    @pytest.mark.parametrize("kind", ["sign flipped", "scaled", "scaled and flipped"])
    def test_as_many_as_are_cut_do_not_move_the_trimmed_mean_out(self, kind):
        clients = self.clients(3)
        # floor(0.2 * 10) = 2 are cut of the first components, 1 of the five of the last.
        mixed = [attacked(c, kind) if k in (0, 1) else c for k, c in enumerate(clients)]
        honest = [c for k, c in enumerate(clients) if k not in (0, 1)]
        assert self.inside(robust_factors(mixed, PREVIOUS, "trimmed_mean", TRIM), honest)

    def test_more_than_are_cut_move_the_trimmed_mean(self):
        clients = self.clients(3)
        mixed = [attacked(c, "scaled") if k < 4 else c for k, c in enumerate(clients)]
        result = robust_factors(mixed, PREVIOUS, "trimmed_mean", TRIM)
        assert not self.inside(result, clients[4:])


class TestRobustMean:
    @pytest.mark.parametrize(
        ("values", "median", "trimmed"),
        [
            ([5.0], 5, 5),
            ([1, 5], 3, 3),
            ([9, 1, 2], 2, 2),  # at least one is cut at either end
            ([100, 1, 2, 4], 3, 3),
            ([0, 1, 2, 5, 900], 2, 8 / 3),
            ([0, 0, 3, 4, 5, 6, 7, 8, 99, 99], 5.5, 33 / 6),  # floor(0.2 * 10) = 2
        ],
    )
    def test_examples(self, values, median, trimmed):
        column = torch.tensor(values, dtype=torch.float64)
        assert robust_mean(column, "median", TRIM).item() == median
        assert robust_mean(column, "trimmed_mean", TRIM).item() == pytest.approx(trimmed)

    def test_a_share_that_is_whole_but_for_rounding_is_whole(self):
        values = torch.tensor([0.0] * 29 + [1.0] * 42 + [5.0] * 29)
        # 0.29 * 100 is 28.999...96 in binary; 28 cut would leave a 0 and a 5.
        assert robust_mean(values, "trimmed_mean", 0.29).item() == 1

    def test_a_missing_value_is_no_value(self):
        values = torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan], [3.0, torch.nan]])
        result = robust_mean(values, "median", TRIM)
        assert result[0].item() == 2
        assert result[1].isnan()

    def test_other_rules_are_refused(self):
        with pytest.raises(ValueError, match="median or trimmed_mean, got 'krum'"):
            robust_mean(torch.ones(3), "krum", TRIM)

    @pytest.mark.parametrize("trim_fraction", [0.0, 0.5, -0.1])
    def test_other_shares_are_refused(self, trim_fraction):
        with pytest.raises(ValueError, match=r"trim_fraction must be in \(0, 0.5\)"):
            robust_mean(torch.ones(3), "trimmed_mean", trim_fraction)


class TestRobustTensors:
    def test_each_name_is_reduced_over_all_clients(self):
        clients = [
            {"weight": torch.full((2, 5), v), "bias": torch.full((2,), -v)} for v in (1.0, 2, 1e9)
        ]
        result = robust_tensors(clients, "median", TRIM)
        assert torch.equal(result["weight"], torch.full((2, 5), 2.0))
        assert torch.equal(result["bias"], torch.full((2,), -2.0))


class TestRobustSums:
    def test_is_the_rule_over_what_was_added_and_weights_count_apart(self):
        contributions = contributions_of([(0, 2), (2,), (2, 1), (1, 2)], seed=3)
        sums, plain = RobustSums.empty(PREVIOUS, "median", TRIM), ComponentSums.zeros(PREVIOUS)
        for (factors, slots), weight in zip(contributions, (3.0, 90.0, 7.0, 11.0), strict=True):
            sums, plain = sums.add(factors, slots, weight), plain.add(factors, slots, weight)

        expected = robust_factors(contributions, PREVIOUS, "median", TRIM)
        assert_same_bits(sums.average_over_contributors(PREVIOUS), expected)
        assert torch.equal(sums.weight, plain.weight)
        assert sums.total_weight == plain.total_weight == 111

    @pytest.mark.parametrize(
        ("slots", "weight", "reason"),
        [((1, 1), 1.0, "distinct"), ((0, 9), 1.0, "must be in"), ((0, 1), -1.0, "weight")],
    )
    def test_what_cannot_be_added_is_refused_at_once(self, slots, weight, reason):
        factors = random_factors(2, 3)
        with pytest.raises(ValueError, match=reason):
            RobustSums.empty(PREVIOUS, "median", TRIM).add(factors, slots, weight)

    def test_zeros_for_the_missing_are_refused(self):
        with pytest.raises(ValueError, match="zeros"):
            RobustSums.empty(PREVIOUS, "median", TRIM).average_over_all(PREVIOUS)
