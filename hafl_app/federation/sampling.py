"""Which clients take part in a round: decided by the seed alone."""

import random
from collections.abc import Sequence

from hafl_app.federation.profiles import NodeProfile


def sample_profiles(
    profiles: Sequence[NodeProfile], fraction: float, seed: int, server_round: int, phase: str
) -> list[NodeProfile]:
    """Draw ``fraction`` of the profiles, at least one, in partition order.

    Flower's node ids are random; drawing partitions makes the same seed choose the same data.

    Parameters
    ----------
    profiles
        Candidates; their order does not matter.
    fraction
        In [0, 1]; 0 draws nobody.
    phase
        Makes training and evaluation draw independently.
    """
    if fraction == 0 or not profiles:
        return []
    candidates = sorted(profiles, key=lambda p: (p.partition_id, p.node_id))
    count = max(1, round(fraction * len(candidates)))
    # A string seed is hashed with SHA-512: the same on every machine.
    drawn = random.Random(f"{seed}/{phase}/{server_round}").sample(range(len(candidates)), count)
    return [candidates[i] for i in sorted(drawn)]


def client_seed(seed: int, server_round: int, partition_id: int) -> int:
    """Return the seed of one client's training in one round, below 2**31."""
    return random.Random(f"{seed}/client/{server_round}/{partition_id}").randrange(2**31)
