"""FlexLoRA: average the dense updates exactly, redistribute them by SVD.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024, arXiv:2402.11505.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hafl_app.fields import choice, number
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.product_sum import ProductSum, truncated_sums
from hafl_app.plan import TrainPlan
from hafl_app.server.aggregation import empty_product_sum
from hafl_app.server.method import StrategyError, Traits
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.wire.node_profile import NodeProfile


@dataclass(frozen=True)
class ProductSums:
    """A round's fold, by module: ``sum_k n_k B_k A_k``, and ``sum_k n_k`` over whom.

    Parameters
    ----------
    sums
        The products.
    sent
        Of the clients that were sent component i, shape ``(max_rank,)``, float64.
    total_weight
        Of all clients.
    """

    sums: Mapping[str, ProductSum]
    sent: Mapping[str, Tensor]
    total_weight: float = 0.0


@dataclass(kw_only=True, eq=False)
class FlexLora(HeterogeneousLora):
    """The global update is a mean of products; a client gets its best rank-r approximation.

    With ``w_k = n_k / sum_j n_j`` over the participants, per module:

    - ``aggregation=state``, the paper's: ``M <- trunc(sum_k w_k B_k A_k)``
    - ``aggregation=change``: ``M <- trunc(M + eta * sum_k w_k (B_k A_k - sent_k))``

    ``trunc`` keeps ``max_rank`` singular values. M is kept as ``lora_B = U S``, ``lora_A = V^T``,
    largest first, so that the first r components are M's best approximation of rank r: that
    prefix is what a client of rank r receives. Where M has less rank, lora_B is 0 and the rows of
    lora_A are orthogonal to the others, so that the component can learn.

    With ``state``, what truncation kept from a client counts as zero in the mean: while local
    change is small, singular value i shrinks each round by its coverage
    ``f_i = sum_{k: r_k >= i} w_k``, toward the lowest rank that all share. With ``change`` the
    server remembers what it sent, and keeps the tail that a client never saw.

    Differs from the paper: ``change`` is ours. The SVD works on the stacked factors in float64,
    never on the dense matrix where that is larger; the result is the same to rounding. Released
    code splits off 16/r for the client; here each plan carries its scaling and lora_B holds it.
    The paper's server keeps all of the mean (whose rank is up to ``sum_k r_k``) until the clients'
    ranks cut it: with max_rank at least the largest client's rank, that is the same under
    ``state``. Under ``change`` the server's M itself is cut, and loses the directions beyond
    max_rank for good: nothing carries that error over to the next round.

    Parameters
    ----------
    aggregation
        ``state`` or ``change``.
    server_step
        ``eta`` of ``change``, above 0. 1 is the plain mean; more makes up for components that few
        of the participants hold, less damps noise.
    """

    traits = Traits(
        homogeneous_form="product mean",
        keeps_components=False,  # each round's SVD makes them anew
        not_robust="it averages products, of which only low-rank factors are kept",
        dp_refusal="privacy=central_dp clips and noises factors, and a mean of products would need "
        "noise on every number of the dense weights: use strategy=zero_padding, or "
        "privacy=local_dp",
    )

    aggregation: str = choice("state", "state", "change")
    server_step: float = number(1.0, above=0)

    def check(self, ranks: Sequence[int]) -> None:
        """Refuse also a server step where there is none."""
        super().check(ranks)
        if self.aggregation == "state" and self.server_step != 1:
            raise StrategyError(
                f"strategy.server_step={self.server_step} has no effect with aggregation=state: "
                "use strategy=flexlora_change"
            )

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client holds and trains the largest components, as many as its rank allows."""
        return self.prefix_plan(self.budgets(profile))

    def begin(self, previous: Adapter) -> ProductSums:
        """Return empty sums."""
        modules = previous.modules
        sent = {n: f.lora_A.new_zeros(f.rank, dtype=torch.float64) for n, f in modules.items()}
        return ProductSums(dict.fromkeys(modules, empty_product_sum(self.options)), sent)

    def accumulate(self, state: ProductSums, update: ClientUpdate) -> ProductSums:
        """Add the client's products, and note which components it was sent."""
        weight = float(update.num_examples)
        for name, weights in state.sent.items():
            weights[list(update.plan.modules[name].held)] += weight
        sums = {n: s.add(update.adapter.modules[n], weight) for n, s in state.sums.items()}
        return ProductSums(sums, state.sent, state.total_weight + weight)

    def finish(self, state: ProductSums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Divide by the weight of all participants, and decompose."""
        step = self.server_step / state.total_weight
        sums = {name: one.scale(step) for name, one in state.sums.items()}
        if self.aggregation == "change":
            # M - eta sum_k w_k sent_k: what was sent are components of M.
            sums = {
                name: one.add(_kept(previous.modules[name], 1 - step * state.sent[name]), 1.0)
                for name, one in sums.items()
            }
        dtype = next(iter(previous.modules.values())).lora_A.dtype
        return dict(
            zip(sums, truncated_sums(list(sums.values()), self.max_rank, dtype), strict=True)
        )


def _kept(factors: LoraFactors, shares: Tensor) -> LoraFactors:
    """Return a module with each component times its share."""
    return LoraFactors(factors.lora_A, factors.lora_B * shares.to(factors.lora_B.dtype))
