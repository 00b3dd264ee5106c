"""Factors for the tests of the factor algebra."""

import torch

from hafl_app.lowrank.factors import LoraFactors

OUT, IN = 11, 7  # never square: a transposed factor must fail, not pass


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_factors(
    rank: int,
    seed: int,
    out_features: int = OUT,
    in_features: int = IN,
    dtype: torch.dtype = torch.float64,
) -> LoraFactors:
    generator = seeded(seed)
    return LoraFactors(
        torch.randn(rank, in_features, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(out_features, rank, generator=generator, dtype=torch.float64).to(dtype),
    )


def dense(factors: LoraFactors) -> torch.Tensor:
    """Return the dense update in float64, the tests' oracle."""
    return factors.lora_B.double() @ factors.lora_A.double()


def assert_same_bits(left: LoraFactors, right: LoraFactors) -> None:
    assert torch.equal(left.lora_A, right.lora_A)
    assert torch.equal(left.lora_B, right.lora_B)


def copy(factors: LoraFactors) -> LoraFactors:
    return LoraFactors(factors.lora_A.clone(), factors.lora_B.clone())
