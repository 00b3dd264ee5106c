"""FLoRA-NA: weights for the factors whose product comes closest to the mean of products.

Nguyen et al., "Communication-Efficient and Accurate Approach for Aggregation in Federated Low-Rank
Adaptation", arXiv:2509.26399.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hafl_app.fields import number
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.server.method import Traits
from hafl_app.strategies.kept_updates import KeptUpdates, Updates
from hafl_app.strategies.product_mean import OF_PRODUCTS
from hafl_app.wire.node_profile import NodeProfile

Weights = Float[Tensor, " clients"]
Gram = Float[Tensor, "clients rank clients rank"]

_NEAREST = "arXiv:2509.26399: two weights for each client, nearest to the mean of products"
# Clients that sent the same make the equations singular, to rounding.
_SINGULAR = 1e-10


@dataclass(kw_only=True, eq=False)
class FloraNa(KeptUpdates):
    """FedIT with other weights, one for each client and factor; what travels is what FedIT sends.

    With ``w_k ~ num_examples``, for every weight of the model:

    ``A = sum_k P_k A_k``, ``B = sum_k Q_k B_k``, where P and Q minimize
    ``||(sum_k Q_k B_k)(sum_k P_k A_k) - sum_k w_k B_k A_k||_F``

    They are found by alternating least squares from ``P = Q = w``: Q for this P, then P for this Q,
    ``sweeps`` times, each by the smallest change that is best. No step makes the distance larger,
    so that the model is never farther from the mean of products than FedIT's.

    Reconstruction: the paper was read in its abstract and in referees' reports, which say that P
    and Q have a number for each client and miss how they are found. Weights of its own for every
    weight of the model are a reading. It weights clients alike in the mean of products, for which
    there is ``federation.weighting=uniform``. Every upload is kept until the round ends, also while
    streaming. Ranks are one, as in the paper.

    Parameters
    ----------
    sweeps
        Alternations, at least 0. 0 is FedIT.
    """

    traits = Traits(
        serves_mixed_ranks=False,
        not_robust="it seeks weights for which factors come close to a mean of products",
        dp_refusal=OF_PRODUCTS.dp_refusal,
        coverage_exponent=None,
        breaks={"homogeneous form": _NEAREST},
    )

    sweeps: int = number(20, at_least=0)

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client trains the same components: all of its rank."""
        return self.prefix_plan(self.budgets(profile))

    def finish(self, state: Updates, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Seek the weights of every module, and add up with them what was trained."""
        merged = {}
        for name, before in previous.modules.items():
            trained = sorted({i for update in state for i in update.components(name)})
            # What a client has not trained of them is as it was.
            parts = [
                before.replace(u.components(name), u.adapter.modules[name]).select(trained)
                for u in state
            ]
            shares = torch.tensor([u.num_examples for u in state], dtype=torch.float64)
            added = _nearest(parts, shares / shares.sum(), self.sweeps)
            merged[name] = before.replace(trained, added)
        return merged


def _nearest(parts: list[LoraFactors], shares: Weights, sweeps: int) -> LoraFactors:
    """Return the weighted sums of the factors whose product is nearest to that of the products."""
    lora_A = torch.stack([f.lora_A for f in parts]).double()  # (clients, rank, in)
    lora_B = torch.stack([f.lora_B.T for f in parts]).double()  # (clients, rank, out)
    gram_A, gram_B = _gram(lora_A), _gram(lora_B)
    P, Q = shares, shares
    for _ in range(sweeps):
        Q = _best(Q, P, gram_B, gram_A, shares)
        P = _best(P, Q, gram_A, gram_B, shares)
    dtype = parts[0].lora_A.dtype
    return LoraFactors(
        torch.einsum("k,kri->ri", P, lora_A).to(dtype),
        torch.einsum("k,kro->or", Q, lora_B).to(dtype),
    )


def _gram(factors: Float[Tensor, "clients rank width"]) -> Gram:
    clients, rank, _ = factors.shape
    flat = factors.flatten(0, 1)
    return (flat @ flat.T).view(clients, rank, clients, rank)


def _best(own: Weights, other: Weights, gram: Gram, other_gram: Gram, shares: Weights) -> Weights:
    """Return the best weights of one factor while those of the other stay.

    The normal equations of a least-squares problem whose unknowns multiply one matrix of a client
    each, solved by the smallest change from ``own``.
    """
    # <sum of the other's factors, a client's other factor>, and of that sum with itself
    mixed = torch.einsum("u,uavb->avb", other, other_gram)  # (rank, clients, rank)
    whole = torch.einsum("v,avb->ab", other, mixed)
    left = torch.einsum("uavb,ab->uv", gram, whole)
    right = torch.einsum("v,uavb,avb->u", shares, gram, mixed)
    missing = right - left @ own
    change: Weights = torch.linalg.pinv(left, rtol=_SINGULAR, hermitian=True) @ missing
    return own + change
