"""Cores between frozen bases: what they make, how they are read back, and where bases come from."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from hafl_app.lowrank.cores import cores_of, frozen_bases, spread, with_cores
from hafl_app.lowrank.factors import LoraFactors, ModuleShape, initial_adapter

SHAPES = {"query": ModuleShape(7, 5), "dense": ModuleShape(6, 9)}


def bases(name="dense", rank=4, seed=3):
    return frozen_bases(SHAPES, rank, seed)[name]


def cores(rank=4, size=2):
    generator = torch.Generator().manual_seed(5)
    return LoraFactors(torch.zeros(rank, 0), torch.randn(size, rank, generator=generator))


def test_blocks_are_multiplied_one_by_one():
    made, given = with_cores(cores(), bases()), cores().lora_B.numpy()
    B, A = bases().lora_B.numpy(), bases().lora_A.numpy()
    expected = B[:, :2] @ given[:, :2] @ A[:2] + B[:, 2:] @ given[:, 2:] @ A[2:]
    assert_allclose(made.delta_weight(), expected, atol=1e-6)
    # One core of twice the size would mix the blocks.
    assert np.abs(made.delta_weight().numpy() - B @ np.tile(given, (2, 1)) @ A).max() > 0.1


def test_cores_are_read_back_from_the_factors_they_make():
    read = cores_of(with_cores(cores(), bases()), bases(), size=2)
    assert read.lora_A.shape == (4, 0)
    torch.testing.assert_close(read.lora_B, cores().lora_B, atol=1e-6, rtol=0)


def test_what_no_core_makes_is_left_out():
    factors = with_cores(cores(), bases())
    outside = torch.linalg.qr(bases().lora_B, mode="complete").Q[:, 4:5]
    moved = LoraFactors(factors.lora_A, factors.lora_B + outside)
    torch.testing.assert_close(cores_of(moved, bases(), 2).lora_B, cores().lora_B)


def test_bases_follow_from_the_seed_and_their_columns_are_orthonormal():
    for name, shape in SHAPES.items():
        drawn = bases(name)
        assert drawn.lora_B.shape == (shape.out_features, 4)
        torch.testing.assert_close(drawn.lora_B.T @ drawn.lora_B, torch.eye(4))
    start = initial_adapter(SHAPES, 4, 3).modules["dense"]
    assert torch.equal(bases().lora_A, start.lora_A)
    frozen_bases(SHAPES, 4, 4)
    again = frozen_bases(dict(reversed(SHAPES.items())), 4, 3)["dense"]
    assert torch.equal(again.lora_B, bases().lora_B)
    assert not torch.equal(bases(seed=4).lora_B, bases().lora_B)


def test_of_a_square_weight_the_two_bases_differ():
    square = frozen_bases({"query": ModuleShape(6, 6)}, 3, 0)["query"]
    overlap = square.lora_A @ square.lora_B
    assert overlap.abs().max() < 0.57  # 3 ** -0.5 if they were the same


@pytest.mark.parametrize(("rank", "size"), [(8, 8), (8, 4), (16, 4), (9, 3)])
def test_a_rank_above_a_weights_sides_loses_nothing(rank, size):
    wide = frozen_bases(SHAPES, rank, 1)["query"]  # (7, 5): heads of 4 lie across two bases of 7
    made = with_cores(cores(rank, size), wide)

    read = cores_of(made, wide, size)
    again = with_cores(read, wide)

    assert_allclose(again.delta_weight(), made.delta_weight(), atol=1e-5)
    assert read.lora_B.norm() <= cores(rank, size).lora_B.norm() * (1 + 1e-5)


def test_no_components_make_nothing():
    assert spread(torch.zeros(7, 0), torch.zeros(3, 0)).shape == (7, 0)
