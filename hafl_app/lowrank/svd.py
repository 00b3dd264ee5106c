"""Weighted sums of low-rank updates and their exact truncated SVD, without the dense matrix."""

from dataclasses import dataclass
from math import fsum, isfinite, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from hafl_app.lowrank.factors import LoraFactors


@dataclass(frozen=True)
class WeightedStack:
    """The weighted sum ``sum_k c_k lora_B_k lora_A_k``, kept exactly, as its summands.

    An empty stack is the neutral start of a fold; summands may differ in rank, also rank 0.

    Parameters
    ----------
    pieces
        Pairs of factors and weight ``c_k``; all factors of the same layer, dtype and device.
    """

    pieces: tuple[tuple[LoraFactors, float], ...] = ()

    @property
    def total_weight(self) -> float:
        """Sum of the weights, 0 for an empty stack."""
        return fsum(weight for _, weight in self.pieces)

    def append(self, factors: LoraFactors, weight: float) -> "WeightedStack":
        """Return the stack with ``weight * delta_weight`` added; nothing is copied.

        Parameters
        ----------
        factors
            Any rank; the other sizes, dtype and device as the pieces before.
        weight
            Any finite number. A negative one subtracts, for example what was sent to a client.

        Raises
        ------
        ValueError
            If ``weight`` is not finite, or ``factors`` do not fit the pieces before.
        """
        if not isfinite(weight):
            raise ValueError(f"weight must be finite, got {weight}")
        if self.pieces and _layout(factors) != _layout(self.pieces[0][0]):
            raise ValueError(
                f"(out_features, in_features, dtype, device) is {_layout(factors)}, "
                f"but {_layout(self.pieces[0][0])} in the stack"
            )
        return WeightedStack((*self.pieces, (factors, float(weight))))

    def factors(self) -> LoraFactors:
        """Return the sum as one pair of factors, of rank ``sum_k rank_k``.

        ``lora_B = [sign(c_k) sqrt|c_k| lora_B_k]_k`` side by side and
        ``lora_A = [sqrt|c_k| lora_A_k]_k`` on top of each other: the split keeps both factors at
        the same scale.

        Raises
        ------
        ValueError
            If the stack is empty, so that the size of the layer is unknown.
        """
        if not self.pieces:
            raise ValueError("an empty stack has no factors: append at least one piece")
        return LoraFactors(
            torch.cat([f.lora_A * sqrt(abs(c)) for f, c in self.pieces], dim=0),
            torch.cat([f.lora_B * (sqrt(abs(c)) * _sign(c)) for f, c in self.pieces], dim=1),
        )


def truncated_svd(
    factors: LoraFactors, rank: int, *, generator: torch.Generator | None = None
) -> LoraFactors:
    """Return the best approximation of ``delta_weight`` by ``rank`` components.

    With ``delta_weight = U S V^T``: ``lora_B = U[:, :rank] S[:rank]`` and
    ``lora_A = V^T[:rank]``, so the rows of ``lora_A`` are orthonormal and the error is
    ``sum_{i >= rank} S_i^2`` in the squared Frobenius norm (Eckart, Young 1936).

    Where the matrix has fewer non-zero singular values, the columns of ``lora_B`` are exactly 0
    and the rows of ``lora_A`` complete the orthonormal basis, so that the component can still
    learn. Only ``in_features`` rows can be orthonormal; any further ones are unit vectors,
    orthogonal among themselves in blocks of ``in_features``.

    The largest entry of every column of ``lora_B`` is positive. That makes the result
    reproducible wherever the singular values are distinct; within a repeated one, any
    orthonormal basis is right.

    Parameters
    ----------
    factors
        Any rank, as from `WeightedStack.factors`.
    rank
        Components wanted, at least 1; above the rank of ``factors`` they are padded.
    generator
        Source of the padding rows; None is a generator with seed 0.

    Returns
    -------
    LoraFactors
        Exactly ``rank`` components, largest first, dtype and device as ``factors``.

    Raises
    ------
    ValueError
        If ``rank`` is below 1.
    torch.linalg.LinAlgError
        If the factors are not finite.

    Notes
    -----
    Costs O((out + in) R^2 + R^3) for ``R = factors.rank``, by `_thin_svd`. The aggregation is
    that of Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks
    and Client Resources" (FlexLoRA), arXiv:2402.11505, who decompose the dense matrix.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    left, values, right = _thin_svd(factors, rank)
    sign = left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign()  # (1, k)
    lora_B = torch.nn.functional.pad(left * (values * sign), (0, rank - values.numel()))
    lora_A = _complete_rows(right * sign.T, rank, generator or torch.Generator().manual_seed(0))
    return LoraFactors(lora_A.to(factors.lora_A.dtype), lora_B.to(factors.lora_B.dtype))


def singular_values(factors: LoraFactors) -> Float[Tensor, " k"]:
    """Return the singular values of ``delta_weight``, largest first.

    Returns
    -------
    Tensor
        Shape ``(min(rank, out_features, in_features),)``, float64. Values below the rounding
        error of the decomposition are exactly 0.
    """
    lora_A, lora_B = factors.lora_A.double(), factors.lora_B.double()
    if _is_dense(factors):
        core = lora_B @ lora_A
    else:
        R_B = torch.linalg.qr(lora_B, mode="r").R
        core = R_B @ torch.linalg.qr(lora_A.T, mode="r").R.T  # (R, R)
    values: Tensor = torch.linalg.svdvals(core)
    return values.where(values > _rounding_error(factors), 0.0)


def tail_energy(factors: LoraFactors, rank: int) -> Float[Tensor, ""]:
    """Return the share of the squared norm above the first ``rank`` singular values.

    ``sum_{i >= rank} S_i^2 / sum_i S_i^2``, in [0, 1]; 0 for a zero matrix. Near 0 for a small
    ``rank`` means that the update has collapsed to that rank.

    Parameters
    ----------
    factors
        Any rank.
    rank
        At least 0.

    Raises
    ------
    ValueError
        If ``rank`` is negative.
    """
    if rank < 0:
        raise ValueError(f"rank must not be negative, got {rank}")
    energy = singular_values(factors).square()
    return energy[rank:].sum() / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)


def _thin_svd(
    factors: LoraFactors, rank: int
) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "k in"]]:
    """Return the first ``rank`` singular triplets of ``delta_weight`` that are not 0, in float64.

    With thin QRs ``lora_B = Q_B R_B``, ``lora_A^T = Q_A R_A`` and the small core
    ``R_B R_A^T = U S V^T``, ``delta_weight = (Q_B U) S (Q_A V)^T`` is its exact thin SVD: the
    (out, in) matrix is formed only where it is no larger than the core.
    """
    lora_A, lora_B = factors.lora_A.double(), factors.lora_B.double()
    if _is_dense(factors):
        U, S, Vh = torch.linalg.svd(lora_B @ lora_A, full_matrices=False)
    else:
        Q_B, R_B = torch.linalg.qr(lora_B)  # (out, R), (R, R)
        Q_A, R_A = torch.linalg.qr(lora_A.T)  # (in, R), (R, R)
        U, S, Vh = torch.linalg.svd(R_B @ R_A.T)  # (R, R), (R,), (R, R)
    keep = min(rank, int((_rounding_error(factors) < S).sum()))
    U, S, Vh = U[:, :keep], S[:keep], Vh[:keep]
    return (U, S, Vh) if _is_dense(factors) else (Q_B @ U, S, Vh @ Q_A.T)


def _is_dense(factors: LoraFactors) -> bool:
    """Whether the dense matrix is no larger than what the stacked route works on."""
    return factors.rank >= min(factors.out_features, factors.in_features)


def _rounding_error(factors: LoraFactors) -> Float[Tensor, ""]:
    """Return the size up to which a singular value computed in float64 may be noise.

    Householder QR perturbs each column relative to that column's norm, so the error of the core
    is bounded by ``sum_i ||b_i|| ||a_i||``. Pieces that cancel each other can make the largest
    singular value far smaller than that, so it cannot serve as the yardstick.
    """
    columns: Tensor = torch.linalg.vector_norm(factors.lora_B.double(), dim=0)
    rows: Tensor = torch.linalg.vector_norm(factors.lora_A.double(), dim=1)
    size = max(factors.out_features, factors.in_features, factors.rank)
    return torch.finfo(torch.float64).eps * size * (columns @ rows)


def _complete_rows(
    rows: Float[Tensor, "k in"], rank: int, generator: torch.Generator
) -> Float[Tensor, "rank in"]:
    """Return orthonormal ``rows`` with unit rows appended, orthogonal while there is room.

    The Q of ``[rows^T, Gaussian]`` spans ``rows`` with its first columns, and Householder QR keeps
    the others orthogonal to them to rounding, however close the Gaussian comes to ``rows``.
    """
    in_features = rows.shape[1]
    while len(rows) < rank:
        block = rows[len(rows) // in_features * in_features :]  # not yet a full basis
        missing = min(rank - len(rows), in_features - len(block))
        gaussian = torch.randn(
            in_features, missing, generator=generator, device=generator.device, dtype=rows.dtype
        )
        basis = torch.linalg.qr(torch.cat([block.T, gaussian.to(rows.device)], dim=1)).Q
        rows = torch.cat([rows, basis[:, len(block) :].T])
    return rows


def _layout(factors: LoraFactors) -> tuple[int, int, torch.dtype, torch.device]:
    """Return what pieces of one stack must share."""
    dtype, device = factors.lora_A.dtype, factors.lora_A.device
    return factors.out_features, factors.in_features, dtype, device


def _sign(weight: float) -> float:
    return -1.0 if weight < 0 else 1.0
