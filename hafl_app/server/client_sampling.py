"""Sample the clients of a round: by the seed alone, or by a secret key."""

import hmac
from collections.abc import Sequence

from hafl_app.seeds import sample_positions
from hafl_app.wire.node_profile import NodeProfile


def sample_size(fraction: float, count: int) -> int:
    """Return the size of a share of ``count`` clients: at least one, unless either is 0.

    Parameters
    ----------
    fraction
        In [0, 1].
    count
        At least 0.
    """
    return max(1, round(fraction * count)) if fraction and count else 0


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
        In [0, 1]; 0 draws none.
    phase
        Makes training and evaluation draw independently.
    """
    candidates = sorted(profiles, key=lambda p: (p.partition_id, p.node_id))
    count = sample_size(fraction, len(candidates))
    drawn = sample_positions(len(candidates), count, seed, phase, server_round)
    return [candidates[i] for i in drawn]


def sample_poisson(
    profiles: Sequence[NodeProfile], fraction: float, key: str, server_round: int
) -> list[NodeProfile]:
    """Draw each profile by itself with chance ``fraction``, in partition order.

    Central privacy counts on it: the draw of one node depends on no other, and only the key
    reveals it. May draw none; the round then still happens, with noise alone.

    Parameters
    ----------
    profiles
        Candidates; their order does not matter.
    fraction
        In [0, 1].
    key
        Secret, not the run's public seed: `hafl_app.privacy.mechanism.PrivacyOptions.noise_key`.
    """
    candidates = sorted(profiles, key=lambda p: (p.partition_id, p.node_id))
    # By position, because Flower's node ids change when a run is resumed.
    return [
        profile
        for position, profile in enumerate(candidates)
        if _uniform(key, f"poisson/{server_round}/{position}") < fraction
    ]


def _uniform(key: str, label: str) -> float:
    """Return a number in [0, 1) that only the key foretells: 53 bits of HMAC-SHA-256."""
    digest = hmac.digest(key.encode(), label.encode(), "sha256")
    return (int.from_bytes(digest[:8]) >> 11) * 2.0**-53
