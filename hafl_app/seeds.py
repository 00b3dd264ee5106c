"""Seeds and draws derived from names: the same on every machine and in every engine."""

import random
from typing import Final

LARGEST_SEED: Final = 10**18
"""Every generator takes it, PyTorch's of 64 bits too."""


def client_seed(seed: int, server_round: int, partition_id: int) -> int:
    """Return the seed of one client's training in one round, below 2**31."""
    return random.Random(f"{seed}/client/{server_round}/{partition_id}").randrange(2**31)


def sample_positions(count: int, size: int, *names: object) -> list[int]:
    """Draw ``size`` of the positions 0 to ``count - 1``, in ascending order.

    Parameters
    ----------
    names
        Identify the draw, such as a seed, a phase and a round; other names draw independently.
    """
    # A string seed is hashed with SHA-512: the same on every machine.
    label = "/".join(map(str, names))
    return sorted(random.Random(label).sample(range(count), size))
