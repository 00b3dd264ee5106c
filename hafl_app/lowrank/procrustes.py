"""Rotations of components: the orthogonal Procrustes problem, and part of its solution.

For any rotation R the product ``(lora_B R)(R^T lora_A)`` is ``lora_B lora_A``: the components of
one update can be chosen to lie close to those of another, and nothing else changes.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hafl_app.lowrank.factors import LoraFactors

# Of float32 factors: below this share of the largest, a singular value is rounding.
_ROUNDING = float(torch.finfo(torch.float32).eps)

Rotation = Float[Tensor, "rank rank"]


def nearest_rotation(correlation: Rotation) -> Rotation | None:
    """Return the rotation R with the largest ``trace(R^T correlation)``, its determinant 1.

    With ``correlation = U S V^T``: ``U diag(1, ..., 1, det(U V^T)) V^T`` (Schonemann 1966; Kabsch
    1976 for the determinant). For ``correlation = X Y^T`` it minimizes ``||R^T X - Y||_F``.

    Parameters
    ----------
    correlation
        In float64.

    Returns
    -------
    Tensor or None
        None if a singular value is rounding, so that many rotations are as near, or if a number is
        not finite.
    """
    if not torch.isfinite(correlation).all():
        return None
    left, values, right = torch.linalg.svd(correlation)
    if not len(values) or values[-1] <= _ROUNDING * len(values) * values[0]:
        return None
    left[:, -1] *= torch.linalg.det(left @ right).sign()
    rotation: Tensor = left @ right
    return rotation


def softened(rotation: Rotation, weight: float) -> Rotation:
    """Return the orthogonal matrix nearest to ``(1 - weight) I + weight R``.

    Parameters
    ----------
    weight
        In [0, 1]: 0 gives I, 1 the rotation itself.
    """
    between = (1 - weight) * torch.eye(len(rotation)).to(rotation) + weight * rotation
    left, _, right = torch.linalg.svd(between)
    nearest: Tensor = left @ right
    return nearest


def rotated_toward(
    factors: LoraFactors, reference: LoraFactors, factor: str, weight: float
) -> LoraFactors:
    """Return factors of the same product, with one of them close to that of ``reference``.

    Parameters
    ----------
    factors, reference
        Of the same shape. Scalings that are folded into lora_B do not matter.
    factor
        ``A``: R minimizes ``||R^T lora_A - reference||_F``; ``B``: ``||lora_B R - reference||_F``.
    weight
        How far, see `softened`.

    Returns
    -------
    LoraFactors
        ``lora_B R`` and ``R^T lora_A``; ``factors`` themselves where ``reference`` does not
        determine R, as with lora_B at 0.
    """
    lora_A, lora_B = factors.lora_A.double(), factors.lora_B.double()
    if factor == "A":
        correlation = lora_A @ reference.lora_A.double().T
    else:
        correlation = lora_B.T @ reference.lora_B.double()
    rotation = nearest_rotation(correlation)
    if rotation is None or weight == 0:
        return factors
    rotation = softened(rotation, float(weight))
    return LoraFactors(
        (rotation.T @ lora_A).to(factors.lora_A.dtype), (lora_B @ rotation).to(factors.lora_B.dtype)
    )
