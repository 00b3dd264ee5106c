"""FlexLoRA: average the dense updates exactly, redistribute them by SVD.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024, arXiv:2402.11505.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hafl_app.fields import choice, number
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.product_sum import truncated_sums
from hafl_app.server.method import StrategyError
from hafl_app.strategies.product_mean import (
    ProductMean,
    ProductSums,
    mean_of_changes,
    mean_of_products,
)


@dataclass(kw_only=True, eq=False)
class FlexLora(ProductMean):
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

    def finish(self, state: ProductSums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Divide by the weight of all participants, and decompose."""
        if self.aggregation == "change":
            sums = mean_of_changes(state, previous.modules, self.server_step)
        else:
            sums = mean_of_products(state)
        dtype = next(iter(previous.modules.values())).lora_A.dtype
        return dict(
            zip(sums, truncated_sums(list(sums.values()), self.max_rank, dtype), strict=True)
        )
