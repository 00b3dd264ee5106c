"""All of a sum of products as singular components: as many as it has, of any energy or split."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.product_sum import ProductSum
from hafl_app.lowrank.svd import complete_rows
from hafl_app.lowrank.thin_svd import dense_triplets, exact_triplets


@dataclass(frozen=True)
class Spectrum:
    """The singular components of one sum, largest first, in float64.

    Parameters
    ----------
    values
        Shape ``(k,)``, above 0, falling.
    left, right
        Shapes ``(out_features, k)`` and ``(k, in_features)``, orthonormal.
    """

    values: Float[Tensor, " k"]
    left: Float[Tensor, "out k"]
    right: Float[Tensor, "k in"]

    @classmethod
    def of(cls, one: ProductSum, *, noise: float = 0.0) -> "Spectrum":
        """Return the components whose singular value is above ``noise``, and above rounding.

        Raises
        ------
        torch.linalg.LinAlgError
            If the sum is not finite.
        """
        if one.dense is None:
            stacked = one.stack.factors(torch.float64)
            most = min(stacked.out_features, stacked.in_features)
            scaled, right = exact_triplets(stacked.lora_A, stacked.lora_B, most)
        else:
            matrix = one.matrix()
            scaled, right = dense_triplets(matrix, min(matrix.shape))
        values = torch.linalg.vector_norm(scaled, dim=0)
        kept = int((values > noise).sum())
        return cls(values[:kept], (scaled / values)[:, :kept], right[:kept])

    @property
    def rank(self) -> int:
        """Number of components."""
        return len(self.values)

    def rank_of_energy(self, share: float) -> int:
        """Return the fewest components with this share of the squared norm, ``share`` in (0, 1]."""
        if share == 1 or not self.rank:
            return self.rank
        energy = self.values.square().cumsum(0)
        return min(self.rank, int((energy < share * energy[-1]).sum()) + 1)

    def factors(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> LoraFactors:
        """Return components ``start`` to ``stop`` as they are, the singular values in lora_B."""
        left = self.left[:, start:stop] * self.values[start:stop]
        return LoraFactors(self.right[start:stop].to(dtype), left.to(dtype))

    def trainable(self, rank: int, dtype: torch.dtype, split: str) -> LoraFactors:
        """Return exactly ``rank`` components, those without content still able to learn.

        Where there is no content one factor is 0 and the other completes the orthonormal basis:
        lora_A is 0 with ``split="A"``, else lora_B. The square root of a singular value 0 in both
        factors would leave both without a gradient for good.

        Parameters
        ----------
        split
            Which factor has the singular values: ``B``; ``A``; or ``both``, the square root each.
        """
        values, generator = self.values[:rank], torch.Generator().manual_seed(0)
        left, right = self.left[:, :rank], self.right[:rank]
        missing = rank - len(values)
        zeros = torch.nn.functional.pad
        if split == "A":
            left = complete_rows(left.T.contiguous(), rank, generator).T
            right = zeros(right * values[:, None], (0, 0, 0, missing))
            return LoraFactors(right.to(dtype), left.to(dtype))
        roots = values.sqrt() if split == "both" else torch.ones_like(values)
        right = complete_rows(right, rank, generator)
        scale = torch.cat([roots, roots.new_ones(missing)])
        left = zeros(left * (values / roots), (0, missing))
        return LoraFactors((right * scale[:, None]).to(dtype), left.to(dtype))


def sum_of(pieces: Iterable[tuple[LoraFactors, float]]) -> ProductSum:
    """Return the weighted sum of these products, at least one."""
    total = ProductSum()
    for factors, weight in pieces:
        total = total.add(factors, weight)
    return total
