import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.quantize import Int8Factors, RoundingErrors, dequantize, quantize

OUT, IN = 7, 5  # never square


def vectors(count, n, seed, spread=6):
    """Vectors whose sizes differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** (spread * torch.rand(count, 1, generator=generator) - spread / 2)
    return sizes * torch.randn(count, n, generator=generator)


def factors(rank, seed):
    return LoraFactors(vectors(rank, IN, seed), vectors(rank, OUT, seed + 1).T)


class TestQuantize:
    @given(st.integers(0, 6), st.integers(1, 9), st.integers(0, 2**32 - 1))
    def test_no_number_is_off_by_more_than_half_its_own_vectors_scale(self, count, n, seed):
        values = vectors(count, n, seed)

        codes, scales = quantize(values)

        error = (dequantize(codes, scales).double() - values.double()).abs()
        assert (error <= scales.double()[:, None] * (0.5 + 1e-6)).all()
        assert codes.abs().max() <= 127 if count else codes.shape == (0, n)

    @given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**32 - 1))
    def test_a_scale_is_the_largest_number_over_127_and_little_more(self, count, n, seed):
        values = vectors(count, n, seed)
        exact = values.double().abs().amax(1) / 127

        scales = quantize(values)[1].double()

        assert (scales >= exact * (1 - 1e-6)).all()
        assert (scales <= exact * (1 + 2**-7 + 1e-6)).all()  # bfloat16 has 8 bits

    def test_is_to_nearest_and_symmetric(self):
        values = torch.tensor([[127.0, 0.4, 0.6, -0.4, -0.6, 100.5001, -127.0]])

        codes, scales = quantize(values)

        assert scales.tolist() == [1.0]
        assert codes.tolist() == [[127, 0, 1, 0, -1, 101, -127]]
        assert torch.equal(quantize(-values)[0], -codes)

    def test_a_vector_of_zeros_stays_zero(self):
        codes, scales = quantize(torch.zeros(2, 3))

        assert torch.equal(dequantize(codes, scales), torch.zeros(2, 3))

    @pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_shows_in_the_scale_of_its_vector_alone(self, wrong):
        values = torch.ones(3, 4)
        values[1, 2] = wrong

        assert quantize(values)[1].isfinite().tolist() == [True, False, True]

    @pytest.mark.parametrize("size", [1e-35, 3e38])
    def test_the_smallest_and_the_largest_numbers_keep_the_bound(self, size):
        values = torch.tensor([[size, -size / 3, 0.0]])

        codes, scales = quantize(values)

        error = (dequantize(codes, scales).double() - values.double()).abs()
        assert (error <= scales.double() * (0.5 + 1e-6)).all()

    def test_what_is_too_small_for_a_scale_becomes_zero(self):
        codes, scales = quantize(torch.tensor([[1e-44, -1e-44]]))

        assert not dequantize(codes, scales).any()


class TestInt8Factors:
    def test_scales_belong_to_rows_of_lora_a_and_columns_of_lora_b(self):
        coded = Int8Factors.of(factors(3, seed=1))

        assert coded.lora_A.shape == (3, IN)
        assert coded.lora_B.shape == (OUT, 3)
        assert coded.scales_A.shape == coded.scales_B.shape == (3,)

    @given(st.integers(1, 4), st.integers(0, 2**32 - 1))
    def test_a_component_does_not_depend_on_the_others(self, rank, seed):
        whole = factors(rank, seed)
        last = [rank - 1]

        alone = Int8Factors.of(whole.select(last)).decoded()

        together = Int8Factors.of(whole).decoded().select(last)
        assert torch.equal(alone.lora_A, together.lora_A)
        assert torch.equal(alone.lora_B, together.lora_B)


class TestRoundingErrors:
    def rounded(self, wanted):
        return Int8Factors.of(wanted).decoded()

    @given(st.lists(st.integers(0, 5), unique=True, min_size=1), st.integers(0, 2**32 - 1))
    def test_what_was_uploaded_and_is_kept_back_is_all_that_was_trained(self, components, seed):
        trained, sent = torch.zeros(6, IN).double(), torch.zeros(6, IN).double()
        trained_B, sent_B = torch.zeros(OUT, 6).double(), torch.zeros(OUT, 6).double()
        kept = RoundingErrors.none(factors(1, 0))
        for turn in range(6):
            # Other components in every round, in another order.
            now = components[turn % len(components) :] + components[: turn % 2]
            now = list(dict.fromkeys(now))
            change = factors(len(now), seed % 10**6 + 10 * turn)
            wanted = kept.added_to(change, now)
            read = self.rounded(wanted)
            kept = kept.after(wanted, read, now, now)
            trained[now] += change.lora_A.double()
            trained_B[:, now] += change.lora_B.double()
            sent[now] += read.lora_A.double()
            sent_B[:, now] += read.lora_B.double()

        owed, owed_B = torch.zeros_like(trained), torch.zeros_like(trained_B)
        owed[list(kept.components)] = kept.errors.lora_A.double()
        owed_B[:, list(kept.components)] = kept.errors.lora_B.double()
        scale = trained.abs().max() + trained_B.abs().max()
        assert (sent + owed - trained).abs().max() <= 1e-5 * scale
        assert (sent_B + owed_B - trained_B).abs().max() <= 1e-5 * scale

    def test_changes_too_small_to_be_uploaded_get_through_in_time(self):
        # 0.3 of a step a round: without feedback each is rounded to nothing.
        change = LoraFactors(torch.tensor([[127.0, 0.3]]), torch.zeros(3, 1))
        kept, sum_with, sum_without = RoundingErrors.none(change), 0.0, 0.0
        for _ in range(20):
            wanted = kept.added_to(change, [4])
            read = self.rounded(wanted)
            kept = kept.after(wanted, read, [4], [4])
            sum_with += float(read.lora_A[0, 1])
            sum_without += float(self.rounded(change).lora_A[0, 1])

        assert sum_without == 0
        assert sum_with == pytest.approx(6.0, abs=0.51)

    def test_components_that_were_not_asked_for_keep_theirs(self):
        first = factors(2, 1)
        kept = RoundingErrors.none(first).after(first, self.rounded(first), [3, 0], [3, 0])
        second = factors(1, 5)

        later = kept.after(second, self.rounded(second), [0], [0])

        assert later.components == (3, 0)
        assert torch.equal(later.errors.lora_A[0], kept.errors.lora_A[0])
        assert not torch.equal(later.errors.lora_A[1], kept.errors.lora_A[1])

    def test_pruned_components_keep_nothing(self):
        first = factors(3, 1)
        kept = RoundingErrors.none(first).after(first, self.rounded(first), [0, 1, 2], [0, 1, 2])
        shorter = factors(2, 5)

        later = kept.after(shorter, self.rounded(shorter), [0, 1], [0, 1, 2])

        assert later.components == (0, 1)

    def test_a_change_that_is_not_finite_does_not_spoil_the_next(self):
        change = factors(2, 3)
        change.lora_A[1, 2] = math.nan
        change.lora_B[0, 1] = math.inf
        kept = RoundingErrors.none(change).after(change, self.rounded(change), [0, 1], [0, 1])

        wanted = kept.added_to(factors(2, 9), [0, 1])

        assert wanted.lora_A.isfinite().all()
        assert wanted.lora_B.isfinite().all()
