"""GLoRA: average the dense updates in the subspace that most clients share.

Chen, Liu and Zhu, "Beyond Factor Aggregation: Gauge-Aware Low-Rank Server Representations for
Federated LoRA", arXiv:2605.06733.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from hafl_app.fields import number
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.spectrum import Spectrum, sum_of
from hafl_app.lowrank.svd import truncated_svds
from hafl_app.plan import TrainPlan
from hafl_app.server.method import StrategyError
from hafl_app.strategies.kept_updates import KeptUpdates, Updates
from hafl_app.strategies.product_mean import OF_PRODUCTS
from hafl_app.wire.node_profile import NodeProfile

_SHARED = "arXiv:2605.06733: what lies outside the clients' consensus subspace is lost"


@dataclass(kw_only=True, eq=False)
class GLora(KeptUpdates):
    """FlexLoRA in consensus coordinates: clients vote on directions, whatever their size.

    With ``w_k ~ num_examples`` and, of every client's product ``B_k A_k``, the orthonormal bases
    ``U_k`` of its columns and ``V_k`` of its rows:

    - U: the R leading eigenvectors of the mean projector ``sum_k w_k U_k U_k^T``; V likewise
    - ``C = sum_k w_k (U^T B_k)(A_k V)``, R x R: the mean of products in these coordinates
    - ``U C V^T`` by SVD, so that a client of rank r reads out its first r components

    All of it depends on the products alone, not on how they are factored. Where R reaches the rank
    of all uploads side by side, ``U C V^T`` is the mean of products, and this is FlexLoRA;
    below that, a direction counts by how many clients have it, and not by how far one went in it.

    Reconstruction: the paper was read in its abstract, and in notes of its two propositions, which
    are the paragraph above. That both sides have a subspace, the weights of the projectors, and the
    size of R are readings. Every upload is kept until the round ends, also while streaming.

    Parameters
    ----------
    subspace_rank
        ``R``, at least ``max_rank``; 0 is ``max_rank``.
    """

    traits = replace(OF_PRODUCTS, breaks={"homogeneous form": _SHARED}, coverage_exponent=None)

    subspace_rank: int = number(0, at_least=0)

    def check(self, ranks: Sequence[int]) -> None:
        """Refuse also a subspace that is smaller than the adapter."""
        super().check(ranks)
        if 0 < self.subspace_rank < self.max_rank:
            raise StrategyError(
                f"strategy.subspace_rank={self.subspace_rank} is below "
                f"lora.max_rank={self.max_rank}: use 0, or at least that"
            )

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client holds and trains the first components, as many as its rank allows."""
        return self.prefix_plan(self.budgets(profile))

    def finish(self, state: Updates, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Find the consensus subspaces, average in them, and decompose."""
        total, rank = sum(u.num_examples for u in state), self.subspace_rank or self.max_rank
        shares = [u.num_examples / total for u in state]
        means = [
            _mean_in_consensus([u.adapter.modules[name] for u in state], shares, rank)
            for name in previous.modules
        ]
        cut = truncated_svds(means, self.max_rank)
        return {
            name: LoraFactors(f.lora_A.to(before.lora_A.dtype), f.lora_B.to(before.lora_B.dtype))
            for (name, before), f in zip(previous.modules.items(), cut, strict=True)
        }


def _mean_in_consensus(
    parts: Sequence[LoraFactors], shares: Sequence[float], rank: int
) -> LoraFactors:
    """Return ``U (C V^T)``, of at most ``rank`` components, in float64."""
    spectra = [Spectrum.of(sum_of([(factors, 1.0)])) for factors in parts]
    U = _consensus([one.left for one in spectra], shares, rank)
    V = _consensus([one.right.T for one in spectra], shares, rank)
    core = U.new_zeros(U.shape[1], V.shape[1])
    for factors, share in zip(parts, shares, strict=True):
        core += share * (U.T @ factors.lora_B.double()) @ (factors.lora_A.double() @ V)
    return LoraFactors(core @ V.T, U)


def _consensus(
    bases: Sequence[Float[Tensor, "width _"]], shares: Sequence[float], rank: int
) -> Float[Tensor, "width k"]:
    """Return the leading eigenvectors of the mean projector, at most ``rank``."""
    # The eigenvectors of X X^T are the left singular vectors of X.
    weighted = [base * share**0.5 for base, share in zip(bases, shares, strict=True)]
    left: Tensor = torch.linalg.svd(torch.cat(weighted, dim=1), full_matrices=False).U
    return left[:, :rank]
