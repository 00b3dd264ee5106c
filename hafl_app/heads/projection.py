"""A random projection of wide features, which every node and the server make of the run's seed."""

import random
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=2)
def random_projection(width: int, size: int, seed: int) -> Tensor:
    """Return R of shape ``(width, size)`` with independent entries ``N(0, 1 / size)``, float64.

    ``R^T x`` has the norm of x in expectation (Johnson and Lindenstrauss, 1984).

    Parameters
    ----------
    width
        Features of the encoder.
    size
        Features that are left, below ``width``.
    """
    drawn = random.Random(f"{seed}/head projection/{width}/{size}").randrange(2**63)
    generator = torch.Generator().manual_seed(drawn)
    gaussian = torch.randn(width, size, generator=generator, dtype=torch.float64)
    scaled: Tensor = gaussian / size**0.5
    return scaled
