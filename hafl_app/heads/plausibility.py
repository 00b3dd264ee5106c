"""Whether sums of features can be sums over examples: one node must not own the head.

The matrix ``sum [x; y] [x; y]^T``, of ``sum x x^T``, ``sum x y^T`` and the class counts, is
positive semidefinite for any examples, and the trace of ``sum x x^T`` is bounded by their number
where the norm of features is.
"""

import math

import torch
from torch import Tensor

from hafl_app.heads.feature_sums import FeatureSums

# Rounding a sum to float32 moves each entry of S by at most 2^-24 sqrt(S_ii S_jj), so an eigenvalue
# by at most 2^-24 of the trace; P and what follows from it by a few times that.
_ROUNDING = 1e-6


def implausible(sums: FeatureSums, most_norm: float) -> str:
    """Say what no examples can have as their sums; empty if some can.

    Parameters
    ----------
    sums
        Of one client, as it states them; rounded to float32 at most.
    most_norm
        L2 norm that no example's features exceed.
    """
    counts = sums.class_counts
    if not counts.isfinite().all() or counts.min() < 0 or (counts != counts.round()).any():
        return f"class counts of {_odd(counts)}, expected whole numbers from 0"
    for name, tensor in (("sums by class", sums.class_sums), ("moments", sums.moments)):
        if tensor is not None and not tensor.isfinite().all():
            return f"{name}: {int((~tensor.isfinite()).sum())} numbers are not finite"
    return _wrong_classes(sums, most_norm) or _wrong_moments(sums, most_norm)


def _odd(counts: Tensor) -> float:
    wrong = ~counts.isfinite() | (counts < 0) | (counts != counts.round())
    return float(counts[wrong][0])


def _wrong_classes(sums: FeatureSums, most_norm: float) -> str:
    """Say which class has a longer sum of features than its examples can have together."""
    norms = torch.linalg.vector_norm(sums.class_sums, dim=0)
    excess = norms - (1 + _ROUNDING) * most_norm * sums.class_counts
    worst = int(excess.argmax())
    if excess[worst] <= 0:
        return ""
    return (
        f"class {worst}: the features of {sums.class_counts[worst]:.0f} examples add up to a norm "
        f"of {norms[worst]:.4g}, expected at most {most_norm:.4g} for each"
    )


def _wrong_moments(sums: FeatureSums, most_norm: float) -> str:
    if sums.moments is None:
        return ""
    trace, n = float(sums.moments.trace()), sums.num_examples
    if not 0 <= trace <= (1 + _ROUNDING) * n * most_norm**2:
        most = n * most_norm**2
        return f"moments: a trace of {trace:.4g}, expected 0 to {most:.4g} for {n:.0f} examples"
    lowest = float(torch.linalg.eigvalsh(_within_classes(sums)).min())
    if not math.isfinite(lowest) or lowest < -_ROUNDING * trace:
        return (
            "moments: they do not fit the sums by class, or are not positive semidefinite (an "
            f"eigenvalue of {lowest:.4g} beside a trace of {trace:.4g})"
        )
    return ""


def _within_classes(sums: FeatureSums) -> Tensor:
    """Return ``S - sum_c p_c p_c^T / n_c``: positive semidefinite just if the whole matrix is."""
    assert sums.moments is not None
    scaled = sums.class_sums / sums.class_counts.clamp(min=1).sqrt()
    return sums.moments - scaled @ scaled.T
