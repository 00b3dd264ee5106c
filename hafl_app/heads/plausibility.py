"""Whether sums of features can be sums over examples: one node must not own the head.

The matrix ``sum [x; y] [x; y]^T``, of ``sum x x^T``, ``sum x y^T`` and the class counts, is
positive semidefinite for any examples, and the trace of ``sum x x^T`` is bounded by their number
where the norm of features is. Rounded sums are so but for a little. That little is taken out: else
one client could subtract with it what others have in directions where their features hardly vary.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from hafl_app.heads.feature_sums import FeatureSums

# Rounding a sum to float32 moves each entry of S by at most 2^-24 sqrt(S_ii S_jj), so an eigenvalue
# by at most 2^-24 of the trace; P and what follows from it by a few times that.
_ROUNDING = 1e-6


class ImplausibleSumsError(ValueError):
    """Sums that no examples can have; says why in one line."""


def plausible(sums: FeatureSums, most_norm: float) -> FeatureSums:
    """Return sums that examples can have: these, without what rounding alone can have added.

    Parameters
    ----------
    sums
        Of one client, as it states them; rounded to float32 at most.
    most_norm
        L2 norm that no example's features exceed.

    Returns
    -------
    FeatureSums
        Those with the nearest moments that examples can have beside these sums by class.

    Raises
    ------
    ImplausibleSumsError
        If no examples can have them.
    """
    counts = sums.class_counts
    if not counts.isfinite().all() or counts.min() < 0 or (counts != counts.round()).any():
        raise ImplausibleSumsError(f"class counts of {_odd(counts)}, expected whole numbers from 0")
    for name, tensor in (("sums by class", sums.class_sums), ("moments", sums.moments)):
        if tensor is not None and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise ImplausibleSumsError(f"{name}: {count} numbers are not finite")
    _check_classes(sums, most_norm)
    if sums.moments is None:
        return sums
    return replace(sums, moments=sums.moments + _missing(sums, sums.moments, most_norm))


def _odd(counts: Tensor) -> float:
    wrong = ~counts.isfinite() | (counts < 0) | (counts != counts.round())
    return float(counts[wrong][0])


def _check_classes(sums: FeatureSums, most_norm: float) -> None:
    """Reject a class with a longer sum of features than its examples can have together."""
    norms = torch.linalg.vector_norm(sums.class_sums, dim=0)
    excess = norms - (1 + _ROUNDING) * most_norm * sums.class_counts
    worst = int(excess.argmax())
    if excess[worst] > 0:
        raise ImplausibleSumsError(
            f"class {worst}: the features of {sums.class_counts[worst]:.0f} examples add up to a "
            f"norm of {norms[worst]:.4g}, expected at most {most_norm:.4g} for each"
        )


def _missing(sums: FeatureSums, moments: Tensor, most_norm: float) -> Tensor:
    """Return what moments lack to be those of examples; reject what rounding does not explain.

    ``S - sum_c p_c p_c^T / n_c`` is positive semidefinite just if the whole matrix is: its negative
    part is what is missing.
    """
    trace, n = float(moments.trace()), sums.num_examples
    if not 0 <= trace <= (1 + _ROUNDING) * n * most_norm**2:
        raise ImplausibleSumsError(
            f"moments: a trace of {trace:.4g}, expected 0 to {n * most_norm**2:.4g} for {n:.0f} "
            "examples"
        )
    scaled = sums.class_sums / sums.class_counts.clamp(min=1).sqrt()
    values, vectors = torch.linalg.eigh(moments - scaled @ scaled.T)
    lowest = float(values.min())
    if not math.isfinite(lowest) or lowest < -_ROUNDING * trace:
        raise ImplausibleSumsError(
            "moments: they do not fit the sums by class, or are not positive semidefinite (an "
            f"eigenvalue of {lowest:.4g} beside a trace of {trace:.4g})"
        )
    negative = vectors[:, values < 0]
    missing: Tensor = (negative * -values[values < 0]) @ negative.T
    return missing
