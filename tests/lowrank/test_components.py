import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowrank_factories import IN, OUT, assert_same_bits, copy, dense, random_factors

from hafl_app.lowrank.components import ComponentSums
from hafl_app.lowrank.factors import LoraFactors

RANK = 4
PREVIOUS = random_factors(RANK, 99, dtype=torch.float32)
PARTICIPANTS = st.lists(
    st.tuples(
        st.sets(st.integers(0, RANK - 1)).map(sorted).flatmap(st.permutations),
        st.floats(0.1, 20),
    ),
    min_size=1,
    max_size=5,
)


def updates_of(participants, seed):
    """Return (factors, indices, weight) for every participant."""
    return [
        (random_factors(len(indices), seed + k, dtype=torch.float32), tuple(indices), weight)
        for k, (indices, weight) in enumerate(participants)
    ]


def fold(updates, previous=PREVIOUS):
    sums = ComponentSums.zeros(previous)
    for factors, indices, weight in updates:
        sums = sums.add(factors, indices, weight)
    return sums


def oracle(updates, divide_by):
    """Average each component by plain loops; None where no client trained it."""
    total = sum(weight for _, _, weight in updates)
    averages = []
    for component in range(RANK):
        row, column, covered = torch.zeros(IN).double(), torch.zeros(OUT).double(), 0.0
        for factors, indices, weight in updates:
            if component in indices:
                slot = indices.index(component)
                row += weight * factors.lora_A[slot].double()
                column += weight * factors.lora_B[:, slot].double()
                covered += weight
        divisor = covered if divide_by == "contributors" else total
        averages.append((row / divisor, column / divisor) if covered else None)
    return averages


class TestAverageOverContributors:
    @given(participants=PARTICIPANTS, seed=st.integers(0, 2**32 - 1))
    def test_is_the_average_of_those_who_trained_it(self, participants, seed):
        updates = updates_of(participants, seed)

        result = fold(updates).average_over_contributors(PREVIOUS)

        for i, expected in enumerate(oracle(updates, "contributors")):
            if expected is None:
                assert_same_bits(result.select([i]), PREVIOUS.select([i]))
            else:
                torch.testing.assert_close(result.lora_A[i].double(), expected[0])
                torch.testing.assert_close(result.lora_B[:, i].double(), expected[1])

    def test_a_component_trained_by_one_survives_bit_for_bit(self):
        alone = random_factors(2, 0, dtype=torch.float32)
        other = random_factors(1, 1, dtype=torch.float32)

        sums = fold([(alone, (3, 1), 0.3), (other, (0,), 7.1)])

        result = sums.average_over_contributors(PREVIOUS)
        assert_same_bits(result.select([3, 1]), alone)
        assert_same_bits(result.select([0]), other)
        assert_same_bits(result.select([2]), PREVIOUS.select([2]))

    def test_equal_contributions_are_not_diluted_by_those_who_did_not_train(self):
        trained = PREVIOUS.select(range(2))
        updates = [(trained, (0, 1), 3.0), (trained.select([0]), (0,), 5.0)]

        result = fold(updates).average_over_contributors(PREVIOUS)

        torch.testing.assert_close(result.lora_A, PREVIOUS.lora_A)
        torch.testing.assert_close(result.lora_B, PREVIOUS.lora_B)

    def test_weight_zero_counts_as_not_trained(self):
        trained = random_factors(1, 0, dtype=torch.float32)

        result = fold([(trained, (2,), 0.0)]).average_over_contributors(PREVIOUS)

        assert_same_bits(result, PREVIOUS)

    def test_no_client_trained_anything(self):
        assert_same_bits(fold([]).average_over_contributors(PREVIOUS), PREVIOUS)
        absent = [(PREVIOUS.select(()), (), 4.0)]
        assert_same_bits(fold(absent).average_over_contributors(PREVIOUS), PREVIOUS)


class TestAverageOverAll:
    @given(participants=PARTICIPANTS, seed=st.integers(0, 2**32 - 1))
    def test_is_the_average_with_zeros(self, participants, seed):
        updates = updates_of(participants, seed)

        result = fold(updates).average_over_all(PREVIOUS)

        for i, expected in enumerate(oracle(updates, "all")):
            if expected is None:
                assert not result.lora_B[:, i].any()
                assert torch.equal(result.lora_A[i], PREVIOUS.lora_A[i])
            else:
                torch.testing.assert_close(result.lora_A[i].double(), expected[0])
                torch.testing.assert_close(result.lora_B[:, i].double(), expected[1])

    def test_dilutes_each_factor_by_the_coverage_and_the_product_by_its_square(self):
        """Coverage f_i is the share of the weight that trained component i."""
        ranks, weights = (4, 3, 1), (2.0, 3.0, 5.0)
        coverage = (1.0, 0.5, 0.5, 0.2)  # 10/10, (2+3)/10, (2+3)/10, 2/10
        updates = [
            (PREVIOUS.select(range(r)), tuple(range(r)), w)
            for r, w in zip(ranks, weights, strict=True)
        ]

        result = fold(updates).average_over_all(PREVIOUS)

        for i, f in enumerate(coverage):
            torch.testing.assert_close(result.lora_A[i], f * PREVIOUS.lora_A[i])
            torch.testing.assert_close(result.lora_B[:, i], f * PREVIOUS.lora_B[:, i])
            torch.testing.assert_close(
                dense(result.select([i])), f**2 * dense(PREVIOUS.select([i]))
            )

    def test_a_participant_without_components_dilutes(self):
        trained = (PREVIOUS, tuple(range(RANK)), 3.0)
        absent = (PREVIOUS.select(()), (), 1.0)

        sums = fold([trained, absent])

        assert sums.total_weight == 4.0
        torch.testing.assert_close(sums.average_over_all(PREVIOUS).lora_B, 0.75 * PREVIOUS.lora_B)

    def test_equals_the_contributors_average_when_all_train_everything(self):
        updates = [
            (random_factors(RANK, k, dtype=torch.float32), tuple(range(RANK)), weight)
            for k, weight in enumerate((1.0, 2.5, 0.5))
        ]

        sums = fold(updates)

        assert_same_bits(sums.average_over_all(PREVIOUS), sums.average_over_contributors(PREVIOUS))

    def test_without_participants_nothing_changes(self):
        assert_same_bits(fold([]).average_over_all(PREVIOUS), PREVIOUS)


class TestAverageOfChanges:
    """The oracle is the equation, summed up change by change in plain loops."""

    @given(
        participants=PARTICIPANTS,
        seed=st.integers(0, 2**32 - 1),
        exponent=st.floats(0, 1),
        step=st.floats(0.1, 4),
    )
    def test_is_the_equation(self, participants, seed, exponent, step):
        updates = updates_of(participants, seed)

        result = fold(updates).average_of_changes(PREVIOUS, exponent, step)

        total = sum(weight for _, _, weight in updates)
        for i in range(RANK):
            row, column, covered = torch.zeros(IN).double(), torch.zeros(OUT).double(), 0.0
            for factors, indices, weight in updates:
                if i in indices:
                    slot = indices.index(i)
                    row += weight * (factors.lora_A[slot].double() - PREVIOUS.lora_A[i])
                    column += weight * (factors.lora_B[:, slot].double() - PREVIOUS.lora_B[:, i])
                    covered += weight
            if not covered:
                assert_same_bits(result.select([i]), PREVIOUS.select([i]))
                continue
            divisor = covered ** (1 - exponent) * total**exponent / step
            expected = PREVIOUS.lora_A[i] + row / divisor, PREVIOUS.lora_B[:, i] + column / divisor
            close = {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(result.lora_A[i].double(), expected[0], **close)
            torch.testing.assert_close(result.lora_B[:, i].double(), expected[1], **close)

    @given(participants=PARTICIPANTS, seed=st.integers(0, 2**32 - 1))
    def test_with_exponent_0_is_the_average_over_contributors_bit_for_bit(self, participants, seed):
        sums = fold(updates_of(participants, seed))

        changes = sums.average_of_changes(PREVIOUS, coverage_exponent=0.0)

        assert_same_bits(changes, sums.average_over_contributors(PREVIOUS))

    @pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
    def test_no_change_is_none_bit_for_bit(self, exponent):
        updates = [(PREVIOUS, tuple(range(RANK)), 3.0), (PREVIOUS.select([1]), (1,), 0.3)]
        assert_same_bits(fold(updates).average_of_changes(PREVIOUS, exponent, 2.0), PREVIOUS)
        assert_same_bits(fold([]).average_of_changes(PREVIOUS, exponent), PREVIOUS)


class TestFold:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_dtype_is_that_of_the_previous_adapter(self, dtype):
        previous = random_factors(RANK, 0, dtype=dtype)
        sums = fold([(random_factors(2, 1, dtype=dtype), (0, 3), 2.0)], previous)

        for result in (sums.average_over_contributors(previous), sums.average_over_all(previous)):
            assert result.lora_A.dtype == result.lora_B.dtype == dtype

    def test_sums_in_float64(self):
        """Added to 1e8 in float32, 1 is lost."""
        small = LoraFactors(torch.full((1, IN), 1.0), torch.full((OUT, 1), 1.0))
        big = small.scale(1e8)
        big = LoraFactors(big.lora_A * 1e8, big.lora_B)

        sums = fold([(big, (0,), 1.0), (small, (0,), 1.0), (big, (0,), 1.0)])

        assert sums.lora_A[0, 0].item() == 2e8 + 1
        assert sums.lora_B[0, 0].item() == 2e8 + 1

    @pytest.mark.parametrize("indices", [(0, 1), (0, 2)])
    def test_only_the_sums_are_changed_in_place(self, indices):
        factors = random_factors(2, 0, dtype=torch.float32)
        before, previous = copy(factors), copy(PREVIOUS)

        sums = ComponentSums.zeros(PREVIOUS).add(factors, indices, 2.0)
        lora_A, lora_B, weight = sums.lora_A.clone(), sums.lora_B.clone(), sums.weight.clone()
        average = sums.average_over_contributors(PREVIOUS)
        sums.average_over_all(PREVIOUS)

        assert torch.equal(sums.lora_A, lora_A)
        assert torch.equal(sums.lora_B, lora_B)
        assert torch.equal(sums.weight, weight)
        sums.add(factors, indices, 3.0)
        assert_same_bits(
            average.select(indices), factors
        )  # an average is no part of the sums it was made of
        assert_same_bits(factors, before)
        assert_same_bits(PREVIOUS, previous)

    @pytest.mark.parametrize("indices", [(0,), (1, 1), (0, RANK), (-1, 0)])
    def test_wrong_indices_are_refused(self, indices):
        with pytest.raises(ValueError, match="indices"):
            fold([(random_factors(2, 0, dtype=torch.float32), indices, 1.0)])

    @pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
    def test_wrong_weights_are_refused(self, weight):
        with pytest.raises(ValueError, match="weight"):
            fold([(PREVIOUS, tuple(range(RANK)), weight)])
