"""Rotations of components, against scipy and a search over all angles."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.linalg import orthogonal_procrustes, polar

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.procrustes import nearest_rotation, rotated_toward, softened


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(rank, seed):
    return LoraFactors(random(rank, 9, seed=seed), random(6, rank, seed=seed + 1))


def near(reference, seed):
    """Return factors like those of ``reference``, turned by some rotation and disturbed."""
    turn = torch.linalg.qr(random(reference.rank, reference.rank, seed=seed)).Q
    turn[:, 0] *= torch.linalg.det(turn).sign()
    noisy = LoraFactors(
        reference.lora_A + 0.1 * random(*reference.lora_A.shape, seed=seed + 1),
        reference.lora_B + 0.1 * random(*reference.lora_B.shape, seed=seed + 2),
    )
    return LoraFactors(turn @ noisy.lora_A, noisy.lora_B @ turn.T)


@pytest.mark.parametrize("weight", [1.0, 0.4])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_agrees_with_scipy(factor, weight):
    reference = factors(3, 1)
    before = near(reference, 5)

    after = rotated_toward(before, reference, factor, weight)

    pairs = {"A": (before.lora_A.T, reference.lora_A.T), "B": (before.lora_B, reference.lora_B)}
    R, _ = orthogonal_procrustes(*(part.numpy() for part in pairs[factor]))
    assert np.linalg.det(R) > 0
    R, _ = polar((1 - weight) * np.eye(3) + weight * R)
    assert_allclose(after.lora_A, R.T @ before.lora_A.numpy(), atol=1e-12)
    assert_allclose(after.lora_B, before.lora_B.numpy() @ R, atol=1e-12)
    assert_allclose(after.delta_weight(), before.delta_weight(), atol=1e-12)


def test_no_rotation_of_two_components_comes_closer_even_if_a_reflection_would():
    reference = factors(2, 1)
    flipped = LoraFactors(
        torch.tensor([[1.0], [-1.0]]) * reference.lora_A, reference.lora_B * torch.tensor([1.0, -1])
    )

    after = rotated_toward(flipped, reference, "A", 1.0)

    got = float((after.lora_A - reference.lora_A).norm())
    angles = np.linspace(0, 2 * np.pi, 20001)
    turns = np.array([[np.cos(angles), -np.sin(angles)], [np.sin(angles), np.cos(angles)]])
    moved = np.einsum("jia,jn->ain", turns, flipped.lora_A.numpy())
    best = np.linalg.norm(moved - reference.lora_A.numpy(), axis=(1, 2)).min()
    assert 0 < got == pytest.approx(best, rel=1e-6)


def test_a_folded_scaling_does_not_matter():
    reference = factors(3, 1)
    before = near(reference, 5)

    one = rotated_toward(before, reference, "B", 0.5)
    other = rotated_toward(before.scale(8.0), reference.scale(8.0), "B", 0.5)

    assert_allclose(other.lora_A, one.lora_A, atol=1e-12)
    assert_allclose(other.lora_B, 8 * one.lora_B, atol=1e-11)


def test_nothing_is_rotated_where_the_reference_does_not_say_how():
    before, reference = near(factors(3, 1), 5), factors(3, 1)
    zero = LoraFactors(reference.lora_A, torch.zeros_like(reference.lora_B))
    half = LoraFactors(reference.lora_A, reference.lora_B * torch.tensor([1.0, 1.0, 0.0]))

    for unclear in (zero, half):
        assert rotated_toward(before, unclear, "B", 1.0) is before
    assert rotated_toward(before, reference, "B", 0.0) is before
    assert nearest_rotation(torch.full((2, 2), torch.nan, dtype=torch.float64)) is None
    assert nearest_rotation(torch.zeros(0, 0, dtype=torch.float64)) is None


def test_a_part_of_a_rotation_turns_less():
    rotation = nearest_rotation(random(3, 3, seed=4))
    steps = [float((softened(rotation, w) - torch.eye(3)).norm()) for w in (0.0, 0.3, 0.6, 1.0)]

    assert steps[0] == pytest.approx(0, abs=1e-12)
    assert steps == sorted(steps)
    assert_allclose(softened(rotation, 1.0), rotation, atol=1e-12)
