import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.mixed_bits import STOCHASTIC_BITS, MixedFactors, quantize_to
from hafl_app.lowrank.quantize import RoundingErrors, dequantize, quantize
from hafl_app.plan_parts.number_formats import largest_code

OUT, IN = 7, 5  # never square
LEVELS = (2, 4, 8, 16)


def source(seed):
    return torch.Generator().manual_seed(seed)


def vectors(count, n, seed):
    """Vectors whose sizes differ by orders of magnitude."""
    sizes = 10.0 ** (6 * torch.rand(count, 1, generator=source(seed)) - 3)
    return sizes * torch.randn(count, n, generator=source(seed + 1))


def read(values, bits, seed=0, contract=False):
    return dequantize(*quantize_to(values, bits, contract=contract, generator=source(seed)))


class TestQuantizeTo:
    @pytest.mark.parametrize("bits", LEVELS)
    @given(count=st.integers(0, 5), n=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
    def test_codes_are_in_range_and_numbers_near(self, bits, count, n, seed):
        values = vectors(count, n, seed)

        codes, scales = quantize_to(values, bits, contract=False, generator=source(seed))

        steps = 1.0 if bits <= STOCHASTIC_BITS else 0.5
        error = (dequantize(codes, scales).double() - values.double()).abs()
        assert (error <= scales.double()[:, None] * (steps + 1e-6)).all()
        assert codes.dtype == torch.int16
        assert not count or codes.abs().max() <= largest_code(bits)
        exact = values.double().abs().amax(1) / largest_code(bits) if count else scales.double()
        assert (scales.double() <= exact * (1 + 2**-7 + 1e-6)).all()

    def test_eight_bits_are_int8(self):
        values = vectors(4, 9, seed=3)
        codes, scales = quantize_to(values, 8, contract=True, generator=source(0))

        expected, of_int8 = quantize(values)
        assert torch.equal(codes, expected.to(torch.int16))
        assert torch.equal(scales, of_int8)

    @pytest.mark.parametrize("bits", [2, 4])
    def test_few_bits_are_right_on_average_and_differ_from_draw_to_draw(self, bits):
        values = torch.tensor([[3.0, 0.2, -0.7, 1.6, 0.0]])
        many = torch.stack([read(values, bits, seed) for seed in range(4000)])

        spread = 3.0 / largest_code(bits) / 2
        torch.testing.assert_close(
            many.mean(0), values, rtol=0, atol=6 * spread / math.sqrt(len(many))
        )
        assert many.std(0).max() > 0
        assert torch.equal(read(values, bits, 5), read(values, bits, 5))

    def test_many_bits_need_no_dice(self):
        values = vectors(3, 9, seed=8)
        for bits in (8, 16):
            assert torch.equal(read(values, bits, seed=1), read(values, bits, seed=2))

    @pytest.mark.parametrize("bits", [2, 4])
    def test_contracting_loses_less_than_all_on_average(self, bits):
        values = torch.randn(1, 384, generator=source(0))
        whole = float(values.square().sum())

        lost = [
            [float((read(values, bits, s, c) - values).square().sum()) / whole for s in range(200)]
            for c in (False, True)
        ]

        mean, contracted = (sum(one) / len(one) for one in lost)
        assert (mean > 1) == (bits == 2)
        assert contracted == pytest.approx(mean / (1 + mean), rel=0.05)

    @pytest.mark.parametrize("contract", [False, True])
    @pytest.mark.parametrize("bits", LEVELS)
    def test_zeros_stay_zeros_and_what_is_not_finite_shows_in_its_scale(self, bits, contract):
        assert not read(torch.zeros(2, 3), bits, contract=contract).any()
        for wrong in (math.nan, math.inf):
            values = torch.ones(3, 4)
            values[1, 2] = wrong
            _, scales = quantize_to(values, bits, contract=contract, generator=source(0))
            assert scales.isfinite().tolist() == [True, False, True]


class TestMixedFactors:
    def factors(self, rank, seed=0):
        return LoraFactors(vectors(rank, IN, seed), vectors(rank, OUT, seed + 5).T)

    def test_every_component_has_its_own_bits(self):
        factors = self.factors(4)
        coded = MixedFactors.of(factors, (16, 8, 4, 2), contract=False, generator=source(0))

        assert coded.lora_A.shape == (4, IN)
        assert coded.lora_B.shape == (OUT, 4)
        largest = [largest_code(b) for b in (16, 8, 4, 2)]
        for codes, limits in ((coded.lora_A, largest), (coded.lora_B.T, largest)):
            found = codes.abs().amax(1).tolist()
            assert all(
                0.98 * limit <= code <= limit for code, limit in zip(found, limits, strict=True)
            )

    def test_more_bits_lose_less(self):
        factors = self.factors(3)
        lost = []
        for bits in LEVELS:
            got = MixedFactors.of(
                factors, [bits] * 3, contract=False, generator=source(1)
            ).decoded()
            relative = (got.lora_B - factors.lora_B).norm(dim=0) / factors.lora_B.norm(dim=0)
            lost.append(float(relative.max()))
        assert all(b < a / 3 for a, b in pairwise(lost))

    def test_no_component_is_fine(self):
        coded = MixedFactors.of(self.factors(0), (), contract=True, generator=source(0))
        assert coded.decoded().lora_B.shape == (OUT, 0)


@pytest.mark.parametrize("bits", [2, 4])
def test_errors_that_are_fed_back_stay_bounded(bits):
    """With 2 bits they grow without the contraction: see that it is what keeps them small."""
    largest = {}
    for contract in (True, False):
        kept = RoundingErrors.none(LoraFactors(torch.zeros(1, 384), torch.zeros(3, 1)))
        size, generator = 0.0, source(2)
        for turn in range(60):
            change = LoraFactors(
                torch.randn(1, 384, generator=source(100 + turn)), torch.zeros(3, 1)
            )
            wanted = kept.added_to(change, [4])
            coded = MixedFactors.of(wanted, (bits,), contract=contract, generator=generator)
            kept = kept.after(wanted, coded.decoded(), [4], [4])
            size = max(size, float(kept.errors.lora_A.norm()) / math.sqrt(384))
        largest[contract] = size

    assert largest[True] < 2
    assert (largest[False] > 4) == (bits == 2)
