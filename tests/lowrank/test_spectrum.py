"""All singular components of a sum: as many as it has, whatever route it came by."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.product_sum import ProductSum
from hafl_app.lowrank.spectrum import Spectrum, sum_of

OUT, IN = 9, 7


def random(rank: int, seed: int) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    return LoraFactors(
        torch.randn(rank, IN, generator=generator), torch.randn(OUT, rank, generator=generator)
    )


def product(factors: LoraFactors) -> np.ndarray:
    return factors.lora_B.double().numpy() @ factors.lora_A.double().numpy()


@pytest.mark.parametrize("share", [1.0, 0.1])  # a stack, and a dense matrix
def test_has_the_components_of_the_dense_sum(share):
    one, other = random(2, 0), random(3, 1)
    total = ProductSum(share).add(one, 0.3).add(other, -2.0)
    expected = 0.3 * product(one) - 2.0 * product(other)

    spectrum = Spectrum.of(total)

    assert (total.dense is None) == (share == 1)
    assert spectrum.rank == 5
    assert_allclose(spectrum.values, np.linalg.svd(expected)[1][:5], rtol=1e-9)
    assert_allclose(product(spectrum.factors(torch.float64)), expected, atol=1e-12)
    assert spectrum.factors(torch.float32, 1, 3).rank == 2


def test_what_cancels_is_rounding():
    one = random(3, 0)
    assert Spectrum.of(sum_of([(one, 1.0), (one, -1.0)])).rank == 0
    nearly = LoraFactors(one.lora_A * (1 + 1e-7), one.lora_B)
    assert Spectrum.of(sum_of([(one, 1.0), (nearly, -1.0)]), noise=1e-4).rank == 0


@pytest.mark.parametrize(("share", "rank"), [(0.5, 1), (0.63, 1), (0.65, 2), (0.99, 2), (1.0, 3)])
def test_energy_is_of_the_squares(share, rank):
    diagonal = torch.diag(torch.tensor([4.0, 3.0, 0.1]))  # 16 + 9 + 0.01
    spectrum = Spectrum.of(
        sum_of([(LoraFactors(torch.eye(3, IN), torch.eye(OUT, 3) @ diagonal), 1.0)])
    )
    assert spectrum.rank_of_energy(share) == rank


@pytest.mark.parametrize("split", ["B", "both", "A"])
def test_trainable_components_have_a_gradient_where_there_is_no_content(split):
    one = random(2, 0)

    factors = Spectrum.of(sum_of([(one, 1.0)])).trainable(4, torch.float32, split)

    rows, columns = factors.lora_A.norm(dim=1), factors.lora_B.norm(dim=0)
    assert_allclose(product(factors), product(one), atol=1e-5)
    full, empty = (columns, rows) if split == "A" else (rows, columns)
    assert (empty[2:] == 0).all()
    assert_allclose(full[2:], 1, rtol=1e-6)
    if split == "both":
        assert_allclose(rows[:2], columns[:2], rtol=1e-5)
    else:
        assert_allclose(full, 1, rtol=1e-6)
