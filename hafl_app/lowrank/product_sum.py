"""A weighted sum of any number of low-rank products, exact, in bounded memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.svd import WeightedStack, truncated_dense, truncated_svds

# Ranks stacked up before they are multiplied into the dense matrix: many at once go faster, and
# this many take little memory beside it.
_BLOCK_RANK = 256
_JOINED_NUMBERS = 2**24  # 64 MB in float32


@dataclass(frozen=True)
class ProductSum:
    """``sum_k c_k lora_B_k lora_A_k``: a stack while it is small, else the dense matrix.

    Up to rank ``share * min(out_features, in_features)`` the summands are kept. With all of it,
    the dense matrix is then smaller than they and no slower to decompose; with less, the two are
    never in memory together at full size. The sum is exact to rounding in float64, and takes at
    most the memory of the dense matrix in float64 and that of the summands kept.

    Parameters
    ----------
    share
        In (0, 1].
    stack
        Summands that are not in ``dense`` yet.
    dense
        The others' sum, shape ``(out_features, in_features)``, float64; None while there is none.
    """

    share: float = 1.0
    stack: WeightedStack = field(default_factory=WeightedStack)
    dense: Float[Tensor, "out in"] | None = None

    def add(self, factors: LoraFactors, weight: float) -> "ProductSum":
        """Return the sum with ``weight * delta_weight`` added.

        The matrix of this one may be updated in place, so that there is one of it: go on with what
        is returned.

        Raises
        ------
        ValueError
            As `WeightedStack.append`.
        """
        stack = self.stack.append(_detached_from_message(factors), weight)
        kept = self.share * min(factors.out_features, factors.in_features)
        if stack.rank <= (kept if self.dense is None else min(kept, _BLOCK_RANK)):
            return replace(self, stack=stack)
        return ProductSum(self.share, dense=_added(self.dense, stack))

    def scale(self, factor: float) -> "ProductSum":
        """Return the sum times a finite factor; like `add`, in place."""
        pieces = tuple((factors, weight * factor) for factors, weight in self.stack.pieces)
        dense = None if self.dense is None else self.dense.mul_(factor)
        return ProductSum(self.share, WeightedStack(pieces), dense)

    def matrix(self) -> Float[Tensor, "out in"]:
        """Return the dense sum, in float64."""
        if self.dense is not None and not self.stack.pieces:
            return self.dense
        return _added(self.dense, self.stack)

    def times(self, right: Float[Tensor, "in k"]) -> Float[Tensor, "out k"]:
        """Return the sum times a matrix, in float64; the stack is not made dense for it.

        Raises
        ------
        ValueError
            If the sum is empty, so that its size is unknown.
        """
        right = right.double()
        parts = [c * f.lora_B.double() @ (f.lora_A.double() @ right) for f, c in self.stack.pieces]
        if self.dense is not None:
            parts.append(self.dense @ right)
        if not parts:
            raise ValueError("an empty sum has no size: add at least one product")
        return torch.stack(parts).sum(dim=0)


def truncated_sums(sums: Sequence[ProductSum], rank: int, dtype: torch.dtype) -> list[LoraFactors]:
    """Return the best approximation of every sum by ``rank`` components.

    See `hafl_app.lowrank.svd.truncated_svd`; stacks of one shape are decomposed in one call, dense
    sums one after another.

    Parameters
    ----------
    sums
        None of them empty.
    rank
        At least 1.
    dtype
        Of the result.
    """
    results: dict[int, LoraFactors] = {}
    for few in _groups(sums):
        cut = truncated_svds([sums[i].stack.factors() for i in few], rank)
        results |= {i: _cast(factors, dtype) for i, factors in zip(few, cut, strict=True)}
    return [
        results[i] if i in results else truncated_dense(one.matrix(), rank, dtype)
        for i, one in enumerate(sums)
    ]


def _groups(sums: Sequence[ProductSum]) -> Iterator[list[int]]:
    """Yield the positions of the stacks in groups: joining its pieces copies a whole stack."""
    group, numbers = list[int](), 0
    for i, one in enumerate(sums):
        if one.dense is not None:
            continue
        first, _ = one.stack.pieces[0]
        group.append(i)
        numbers += one.stack.rank * (first.out_features + first.in_features)
        if numbers > _JOINED_NUMBERS:
            yield group
            group, numbers = [], 0
    yield group


def _added(dense: Tensor | None, stack: WeightedStack) -> Tensor:
    lora_A = torch.cat([f.lora_A.double() for f, _ in stack.pieces])
    lora_B = torch.cat([f.lora_B.double() * c for f, c in stack.pieces], dim=1)
    return lora_B @ lora_A if dense is None else dense.addmm_(lora_B, lora_A)


def _detached_from_message(factors: LoraFactors) -> LoraFactors:
    """Copy factors that share one buffer with the other modules, so that it can be freed."""
    return LoraFactors(_own_storage(factors.lora_A), _own_storage(factors.lora_B))


def _own_storage(tensor: Tensor) -> Tensor:
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _cast(factors: LoraFactors, dtype: torch.dtype) -> LoraFactors:
    return LoraFactors(factors.lora_A.to(dtype), factors.lora_B.to(dtype))
