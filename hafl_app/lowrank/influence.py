"""Influence of each of several low-rank changes on their sum, through the factors."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hafl_app.lowrank.factors import LoraFactors


def change_factors(before: LoraFactors, after: LoraFactors) -> LoraFactors:
    """Return factors of the change of the product, ``b' a' - b a = (b' - b) a' + b (a' - a)``.

    Nothing cancels where the change is small. Two components for each of ``before``: that of its
    lora_B, then, behind all of those, that of its lora_A.
    """
    return LoraFactors(
        torch.cat([after.lora_A, after.lora_A - before.lora_A]),
        torch.cat([after.lora_B - before.lora_B, before.lora_B], dim=1),
    )


def influences(modules: Iterable[Sequence[LoraFactors]]) -> Float[Tensor, " clients"]:
    """Return ``<c_k, D> / ||D||^2`` of each client's change ``c_k``, with ``D = sum_k c_k``.

    They sum to 1; one that points against the others has less than 0. In O(R^2 (m + n)) for a
    module of m x n, R the rank of all changes together. No product is formed, unless it has fewer
    than R numbers, as of projected factors; then in O(R m n).

    Parameters
    ----------
    modules
        For each module the clients' changes, always in the same order, as factors of any rank whose
        products they are.

    Returns
    -------
    Tensor
        Shape ``(clients,)``, float64; NaN if the sum is 0, without clients if there is no module.
    """
    inner = torch.zeros(0, dtype=torch.float64)
    for parts in modules:
        lora_A = torch.cat([part.lora_A for part in parts])  # (R, n)
        lora_B = torch.cat([part.lora_B for part in parts], dim=1)  # (m, R)
        total = lora_B @ lora_A if _is_small(lora_A, lora_B) else None
        here = torch.stack([_inner(part, lora_A, lora_B, total) for part in parts]).cpu()
        inner = inner + here if len(inner) else here
    return inner / inner.sum()


def _is_small(lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether a product has fewer numbers than the table of its components' inner products."""
    return lora_A.shape[1] * lora_B.shape[0] < len(lora_A)


def _inner(part: LoraFactors, lora_A: Tensor, lora_B: Tensor, total: Tensor | None) -> Tensor:
    """Return ``<part, lora_B lora_A>``, by that product if it is given."""
    if total is not None:
        return ((part.lora_B.T @ total) * part.lora_A).sum(dtype=torch.float64)
    products = (part.lora_B.T @ lora_B) * (part.lora_A @ lora_A.T)  # (r_k, R)
    return products.sum(dtype=torch.float64)
