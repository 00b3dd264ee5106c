"""Leading singular triplets of stacked factors, by the cheapest route that is exact enough."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hafl_app.lowrank.factors import LoraFactors

Triplets = tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]
"""``(U S, V^T)``: the singular values are inside the left factor."""

_EPS = torch.finfo(torch.float64).eps
# Products of R x R matrices in float64 are off by a small multiple of eps times their norms.
_GRAM_ERROR = 64 * _EPS
# Then the kept directions are off by less than 1e-7 of the matrix's norm, in the worst case.
_CLEARLY_ABOVE = 1e4
_NEGLIGIBLE = 1e-10
_ORTHONORMAL = 1e-9
# How much cancellation may enlarge the rounding of float32: in the product, to some 1e-6 of its
# norm, and in a single row of V^T, to some 1e-5.
_CANCELLATION, _ROW_CANCELLATION = 16.0, 512.0
# Factors of so few numbers a matrix are multiplied out in float64, which costs next to nothing.
_FEW_NUMBERS = 2**14
# Rows converted to float64 at a time: they stay in the cache.
_ROWS_AT_ONCE = 512


def leading_triplets(
    lora_A: Float[Tensor, "batch R in"], lora_B: Float[Tensor, "batch out R"], rank: int
) -> list[Triplets]:
    """Return the leading singular triplets of ``lora_B[i] @ lora_A[i]`` for every ``i``.

    Three routes. Where ``R >= min(out, in)`` the dense matrix is no larger than the factors: an
    eigendecomposition of its smaller Gram matrix. Else of ``L^T (lora_B^T lora_B) L``, (R, R), with
    ``L`` the Cholesky factor of ``lora_A lora_A^T``, so that ``Q = L^-1 lora_A`` has orthonormal
    rows. Both square the condition number; a matrix for which that would show takes the third: QR
    of both factors (or the dense matrix), and an SVD of the small core.

    Everything is decided in float64. The second route multiplies its result out in the factors'
    own dtype where they are large and so little cancels that float32 is as good.

    Returns
    -------
    list of Triplets
        In float64 or the factors' dtype, largest first: up to ``rank``, fewer where the matrix has
        less rank. Rows of ``V^T`` are orthonormal to 1e-9, and the product is off by less than
        1e-7 of its norm; in float32 by some 1e-5 and 1e-6.

    Raises
    ------
    torch.linalg.LinAlgError
        If the factors are not finite.
    """
    out_features, R, in_features = *lora_B.shape[1:], lora_A.shape[2]
    kept = min(rank, R, out_features, in_features)
    if not kept:
        return [exact_triplets(A, B, rank) for A, B in zip(lora_A, lora_B, strict=True)]
    if is_dense(out_features, R, in_features):
        left, right, good = _by_dense_gram(lora_B.double() @ lora_A.double(), kept)
    else:
        left, right, good = _by_gram(lora_A, lora_B, kept)
    return [
        (left[i], right[i]) if fine else exact_triplets(lora_A[i], lora_B[i], rank)
        for i, fine in enumerate(good.tolist())
    ]


def dense_triplets(dense: Float[Tensor, "out in"], rank: int) -> Triplets:
    """Return the leading singular triplets of a matrix that there are no factors of.

    As `leading_triplets`, by the Gram matrix or, where squaring would show, by an SVD.

    Raises
    ------
    torch.linalg.LinAlgError
        If the matrix is not finite.
    """
    dense = dense.double()
    left, right, good = _by_dense_gram(dense[None], min(rank, *dense.shape))
    if good[0]:
        return left[0], right[0]
    noise = _EPS * max(dense.shape) * torch.linalg.matrix_norm(dense)
    return _dense_svd(dense, rank, noise)


def _by_gram(
    lora_A: Float[Tensor, "batch R in"], lora_B: Float[Tensor, "batch out R"], kept: int
) -> tuple[Float[Tensor, "batch out k"], Float[Tensor, "batch k in"], Bool[Tensor, " batch"]]:
    """Return ``(U S, V^T)`` of every matrix, and which of them can be relied upon."""
    gram_A, gram_B = _gram(lora_A.mT), _gram(lora_B)  # (batch, R, R)
    L, failed = torch.linalg.cholesky_ex(gram_A)
    L = torch.where((failed > 0)[:, None, None], torch.eye(L.shape[1]).to(L), L)
    core = _without_nan(L.mT @ gram_B @ L)
    energy, vectors = torch.linalg.eigh(core)  # S^2, smallest first
    vectors = vectors[..., -kept:].flip(-1)
    to_left = L @ vectors  # (batch, R, k): left = lora_B @ to_left
    to_right = torch.linalg.solve_triangular(L.mT, vectors, upper=True)  # right^T = lora_A^T @ it
    size = torch.linalg.matrix_norm(gram_A) * torch.linalg.matrix_norm(gram_B)
    error = _GRAM_ERROR * size
    good = (failed == 0) & _is_above_error(energy, kept, error)
    good &= _is_identity(to_right.mT @ gram_A @ to_right)
    few = lora_A[0].numel() + lora_B[0].numel() <= _FEW_NUMBERS
    if few or lora_A.dtype != torch.float32 or _cancels(gram_A, size, energy, to_right).any():
        lora_A, lora_B = lora_A.double(), lora_B.double()
    return lora_B @ to_left.to(lora_B), to_right.to(lora_A).mT @ lora_A, good


def _cancels(
    gram_A: Float[Tensor, "batch R R"],
    size: Float[Tensor, " batch"],
    energy: Float[Tensor, "batch R"],
    to_right: Float[Tensor, "batch R k"],
) -> Bool[Tensor, " batch"]:
    """Whether float32 would lose digits of ``(U S, V^T)``, for every matrix."""
    rows = torch.linalg.matrix_norm(gram_A)[:, None] * to_right.square().sum(dim=1)  # (batch, k)
    kept = energy[:, -rows.shape[1] :].flip(-1)
    product = torch.maximum(size, (rows * kept).sum(dim=1)) / energy.sum(dim=1)
    lost: Tensor = (product > _CANCELLATION**2) | (rows.amax(dim=1) > _ROW_CANCELLATION**2)
    return lost


def _gram(columns: Float[Tensor, "batch n R"]) -> Float[Tensor, "batch R R"]:
    """Return ``columns^T columns`` of every matrix, in float64."""
    if columns.device.type != "cpu":
        columns = columns.double()
        return columns.mT @ columns
    return torch.stack([_gram_on_cpu(matrix) for matrix in columns])


def _gram_on_cpu(columns: Float[Tensor, "n R"]) -> Float[Tensor, "R R"]:
    """Return the Gram matrix by NumPy, which knows that it is symmetric: half of the products."""
    gram = torch.zeros(columns.shape[1], columns.shape[1], dtype=torch.float64)
    for start in range(0, len(columns), _ROWS_AT_ONCE):
        block = columns[start : start + _ROWS_AT_ONCE].double().numpy()
        gram += torch.from_numpy(block.T @ block)
    return gram


def _by_dense_gram(
    dense: Float[Tensor, "batch out in"], kept: int
) -> tuple[Float[Tensor, "batch out k"], Float[Tensor, "batch k in"], Bool[Tensor, " batch"]]:
    """Return ``(U S, V^T)`` of every matrix, and which of them can be relied upon."""
    wide = dense.shape[1] < dense.shape[2]
    gram = _without_nan(dense @ dense.mT if wide else dense.mT @ dense)
    energy, vectors = torch.linalg.eigh(gram)
    vectors, values = vectors[..., -kept:].flip(-1), energy[:, -kept:].flip(-1)
    if wide:
        values = values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()
        left = vectors * values[:, None]
        right = vectors.mT / values[..., None] @ dense
    else:
        left, right = dense @ vectors, vectors.mT
    good = _is_above_error(energy, kept, _GRAM_ERROR * torch.linalg.matrix_norm(gram))
    return left, right, good & _is_identity(right @ right.mT)


def _is_above_error(
    energy: Float[Tensor, "batch n"], kept: int, error: Float[Tensor, " batch"]
) -> Bool[Tensor, " batch"]:
    """Whether the kept squared singular values, smallest first, are clear of their error bound.

    Then none of those kept is noise, and rounding turns none of them toward one that is cut off.
    """
    clear = energy[:, -kept] > _CLEARLY_ABOVE * error
    return clear & (error < _NEGLIGIBLE * energy.sum(dim=1))


def _is_identity(gram: Float[Tensor, "batch k k"]) -> Bool[Tensor, " batch"]:
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return (gram - identity).abs().amax(dim=(1, 2)) < _ORTHONORMAL


def _without_nan(matrices: Float[Tensor, "batch n n"]) -> Float[Tensor, "batch n n"]:
    """Zero matrices that are not finite, so that `eigh` fails on none of the batch."""
    finite = matrices.isfinite().all(dim=(1, 2), keepdim=True)
    return torch.where(finite, matrices, 0.0)


def exact_triplets(
    lora_A: Float[Tensor, "R in"], lora_B: Float[Tensor, "out R"], rank: int
) -> Triplets:
    """Return the triplets of one matrix without squaring its condition number; see above.

    With thin QRs ``lora_B = Q_B R_B``, ``lora_A^T = Q_A R_A`` and the small core
    ``R_B R_A^T = U S V^T``, ``lora_B lora_A = (Q_B U) S (Q_A V)^T`` is its exact thin SVD.
    """
    lora_A, lora_B = lora_A.double(), lora_B.double()
    noise = rounding_error(LoraFactors(lora_A, lora_B))
    if is_dense(lora_B.shape[0], *lora_A.shape):
        return _dense_svd(lora_B @ lora_A, rank, noise)
    Q_B, R_B = torch.linalg.qr(lora_B)  # (out, R), (R, R)
    Q_A, R_A = torch.linalg.qr(lora_A.T)  # (in, R), (R, R)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)  # (R, R), (R,), (R, R)
    kept = min(rank, int((noise < S).sum()))
    return Q_B @ (U[:, :kept] * S[:kept]), Vh[:kept] @ Q_A.T


def _dense_svd(dense: Float[Tensor, "out in"], rank: int, noise: Float[Tensor, ""]) -> Triplets:
    """Return up to ``rank`` triplets whose singular value is above the noise."""
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    kept = min(rank, int((noise < S).sum()))
    return U[:, :kept] * S[:kept], Vh[:kept]


def is_dense(out_features: int, R: int, in_features: int) -> bool:
    """Whether the dense matrix is no larger than what the factored routes work on."""
    return min(out_features, in_features) <= R


def rounding_error(factors: LoraFactors) -> Float[Tensor, ""]:
    """Return the size up to which a singular value computed in float64 may be noise.

    Householder QR perturbs each column relative to that column's norm, so the error of the core
    is bounded by ``sum_i ||b_i|| ||a_i||``. Pieces that cancel each other can make the largest
    singular value far smaller than that, so it cannot serve as the yardstick.
    """
    size = max(factors.out_features, factors.in_features, factors.rank)
    return _EPS * size * size_of(factors)


def size_of(factors: LoraFactors) -> Float[Tensor, ""]:
    """Return ``sum_i ||b_i|| ||a_i||`` in float64, an upper bound of every norm of the product."""
    columns: Tensor = torch.linalg.vector_norm(factors.lora_B.double(), dim=0)
    rows: Tensor = torch.linalg.vector_norm(factors.lora_A.double(), dim=1)
    return columns @ rows
