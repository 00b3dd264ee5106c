"""Weighted sums of low-rank updates and their exact truncated SVD, without the dense matrix."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import fsum, isfinite, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.thin_svd import (
    Triplets,
    dense_triplets,
    is_dense,
    leading_triplets,
    rounding_error,
)

# Matrices decomposed in one call: their float64 factors stay below this many numbers (32 MB); what
# is larger gains nothing from company.
_BATCH_NUMBERS = 2**22


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

    @property
    def rank(self) -> int:
        """Sum of the pieces' ranks."""
        return sum(factors.rank for factors, _ in self.pieces)

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

    def factors(self, dtype: torch.dtype | None = None) -> LoraFactors:
        """Return the sum as one pair of factors, of rank ``sum_k rank_k``.

        ``lora_B = [sign(c_k) sqrt|c_k| lora_B_k]_k`` side by side and
        ``lora_A = [sqrt|c_k| lora_A_k]_k`` on top of each other: the split keeps both factors at
        the same scale.

        Parameters
        ----------
        dtype
            To compute in; None is that of the pieces.

        Raises
        ------
        ValueError
            If the stack is empty, so that the size of the layer is unknown.
        """
        if not self.pieces:
            raise ValueError("an empty stack has no factors: append at least one piece")
        dtype = dtype or self.pieces[0][0].lora_A.dtype
        return LoraFactors(
            torch.cat([f.lora_A.to(dtype) * sqrt(abs(c)) for f, c in self.pieces], dim=0),
            torch.cat(
                [f.lora_B.to(dtype) * (sqrt(abs(c)) * _sign(c)) for f, c in self.pieces], dim=1
            ),
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
    Costs O((out + in) R^2 + R^3) for ``R = factors.rank``, see `leading_triplets`. The aggregation
    is that of Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous
    Tasks and Client Resources" (FlexLoRA), arXiv:2402.11505, who decompose the dense matrix.
    """
    return truncated_svds([factors], rank, generator=generator)[0]


def truncated_adapter(adapter: Adapter, rank_of: Callable[[str], int]) -> Adapter:
    """Return an adapter with every module cut to its `truncated_svd`; the head is the same.

    Parameters
    ----------
    rank_of
        Components of a module by its name, at least 1.
    """
    modules = {name: truncated_svd(f, rank_of(name)) for name, f in adapter.modules.items()}
    return Adapter(modules, adapter.head)


def truncated_svds(
    matrices: Sequence[LoraFactors], rank: int, *, generator: torch.Generator | None = None
) -> list[LoraFactors]:
    """Return `truncated_svd` of many matrices; those of one shape are decomposed in one call.

    Parameters
    ----------
    matrices
        Of any shapes and ranks; each is decomposed on the device it is on.
    rank, generator
        As for `truncated_svd`; None is a generator with seed 0 for each.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    results: dict[int, LoraFactors] = {}
    for batch in _batches(matrices):
        lora_A = _stacked([matrices[i].lora_A for i in batch])
        lora_B = _stacked([matrices[i].lora_B for i in batch])
        triplets = leading_triplets(lora_A, lora_B, rank)
        for i, triplet in zip(batch, triplets, strict=True):
            results[i] = _padded(triplet, rank, matrices[i].lora_A.dtype, generator)
    return [results[i] for i in range(len(matrices))]


def truncated_dense(dense: Float[Tensor, "out in"], rank: int, dtype: torch.dtype) -> LoraFactors:
    """Return `truncated_svd` of a matrix that there are no factors of, in this dtype."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    return _padded(dense_triplets(dense, rank), rank, dtype, None)


def singular_values(factors: LoraFactors) -> Float[Tensor, " k"]:
    """Return the singular values of ``delta_weight``, largest first.

    Returns
    -------
    Tensor
        Shape ``(min(rank, out_features, in_features),)``, float64. Values below the rounding
        error of the decomposition are exactly 0.
    """
    lora_A, lora_B = factors.lora_A.double(), factors.lora_B.double()
    if is_dense(factors.out_features, factors.rank, factors.in_features):
        core = lora_B @ lora_A
    else:
        R_B = torch.linalg.qr(lora_B, mode="r").R
        core = R_B @ torch.linalg.qr(lora_A.T, mode="r").R.T  # (R, R)
    values: Tensor = torch.linalg.svdvals(core)
    return values.where(values > rounding_error(factors), 0.0)


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


def _batches(matrices: Sequence[LoraFactors]) -> Iterator[list[int]]:
    """Group the positions of matrices that go into one call."""
    alike: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for position, factors in enumerate(matrices):
        alike[(*_layout(factors), factors.rank)].append(position)
    for positions in alike.values():
        first = matrices[positions[0]]
        numbers = first.rank * (first.out_features + first.in_features)
        size = max(1, _BATCH_NUMBERS // max(1, numbers))
        for start in range(0, len(positions), size):
            yield positions[start : start + size]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack without a copy where there is only one."""
    return torch.stack(tuple(tensors)) if len(tensors) > 1 else tensors[0][None]


def _padded(
    triplet: Triplets, rank: int, dtype: torch.dtype, generator: torch.Generator | None
) -> LoraFactors:
    """Return ``rank`` components of fixed sign."""
    left, right = triplet
    if left.shape[1]:
        sign = left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign()  # (1, k)
        left, right = left * sign, right * sign.T
    lora_B = torch.nn.functional.pad(left, (0, rank - left.shape[1]))
    lora_A = complete_rows(right, rank, generator or torch.Generator().manual_seed(0))
    return LoraFactors(lora_A.to(dtype), lora_B.to(dtype))


def complete_rows(
    rows: Float[Tensor, "k in"], rank: int, generator: torch.Generator
) -> Float[Tensor, "rank in"]:
    """Return orthonormal ``rows`` with unit rows appended, orthogonal while there is room.

    The Q of ``[rows^T, Gaussian]`` spans ``rows`` with its first columns, and Householder QR keeps
    the others orthogonal to them to rounding, however close the Gaussian comes to ``rows``.
    """
    in_features = rows.shape[1]
    if len(rows) < rank:
        rows = rows.double()
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
    """Return the sizes, dtype and device that all pieces of one stack must share."""
    dtype, device = factors.lora_A.dtype, factors.lora_A.device
    return factors.out_features, factors.in_features, dtype, device


def _sign(weight: float) -> float:
    return -1.0 if weight < 0 else 1.0
