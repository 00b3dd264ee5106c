"""Cores between frozen bases: ``lora_B`` confined to what a basis spans, in its coordinates.

Block h of an adapter is ``B_h R_h A_h`` with frozen ``B_h`` (out_features, size), its columns
orthonormal, and ``A_h`` (size, in_features). As LoRA factors, lora_A is ``A`` and lora_B is
``B_h R_h``, block by block; a core follows from them as ``R_h = B_h^T lora_B_h``. Where there are
more components than a weight has outputs, columns are not all orthonormal, and the pseudo-inverse
stands for ``B_h^T``. Cores travel as `LoraFactors` of the same rank whose lora_B has ``size`` rows,
and whose lora_A has no columns.
"""

from collections.abc import Mapping
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from hafl_app.lowrank.factors import (
    INITIAL_ROW_NORM,
    LoraFactors,
    ModuleShape,
    initial_adapter,
)

# The run's seed draws the lora_A that every method starts from; the other basis is independent.
_OF_COLUMNS = 7_368_787


def frozen_bases(
    shapes: Mapping[str, ModuleShape], rank: int, seed: int
) -> Mapping[str, LoraFactors]:
    """Return the bases of every module, on the CPU: the same wherever they are drawn.

    Parameters
    ----------
    shapes
        Module name to the size of its layer, of all adapted layers.
    rank
        Components per module, at least 1.
    seed
        At least 0. lora_A is that of `initial_adapter`, so that learning rates carry over.

    Returns
    -------
    Mapping
        Module name to ``A`` as lora_A, and as lora_B the columns of ``B``: orthonormal while
        ``rank <= out_features``, beyond in blocks of so many.
    """
    return _bases(tuple(sorted(shapes.items())), rank, seed)


@lru_cache(maxsize=4)
def _bases(
    named: tuple[tuple[str, ModuleShape], ...], rank: int, seed: int
) -> Mapping[str, LoraFactors]:
    shapes = dict(named)
    turned = {n: ModuleShape(shape.in_features, shape.out_features) for n, shape in named}
    rows = initial_adapter(shapes, rank, seed).modules
    columns = initial_adapter(turned, rank, seed + _OF_COLUMNS).modules
    return {
        name: LoraFactors(rows[name].lora_A, columns[name].lora_A.T / INITIAL_ROW_NORM)
        for name in shapes
    }


def spread(
    basis: Float[Tensor, "out_features rank"], cores: Float[Tensor, "size rank"]
) -> Float[Tensor, "out_features rank"]:
    """Return ``B_h R_h``, block by block: the lora_B that cores make of a basis."""
    size, rank = cores.shape
    blocks = basis.reshape(len(basis), rank // size, size)
    by_block = cores.reshape(size, rank // size, size)
    return torch.einsum("ohs,sht->oht", blocks, by_block).reshape(len(basis), rank)


def with_cores(cores: LoraFactors, bases: LoraFactors) -> LoraFactors:
    """Return whole factors, ``lora_B @ lora_A = sum_h B_h R_h A_h``.

    Parameters
    ----------
    cores
        As they travel.
    bases
        Of the same components.
    """
    return LoraFactors(bases.lora_A, spread(bases.lora_B, cores.lora_B))


def cores_of(factors: LoraFactors, bases: LoraFactors, size: int) -> LoraFactors:
    """Return the cores of factors, as they travel: the smallest with ``B_h R_h = lora_B_h``.

    What of lora_B lies outside the span of its block's basis is left out.

    Parameters
    ----------
    factors, bases
        Of the same components, whole blocks of ``size``.
    """
    out_features, rank = factors.lora_B.shape
    blocks = bases.lora_B.reshape(out_features, rank // size, size)
    if rank > out_features:  # the transpose of orthonormal columns is their inverse, not of these
        inverses = torch.linalg.pinv(blocks.double().movedim(1, 0))  # (blocks, size, out_features)
        blocks = inverses.permute(2, 0, 1).to(blocks.dtype)
    of_blocks = factors.lora_B.reshape(out_features, rank // size, size)
    cores = torch.einsum("ohs,oht->sht", blocks, of_blocks).reshape(size, rank)
    return LoraFactors(factors.lora_A[:, :0], cores)
