"""FedEx-LoRA: average the factors, and merge what that loses into the base.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
Models", ACL 2025, arXiv:2410.09432.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.spectrum import Spectrum
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.base_change import BaseChange, extended, rounding_of
from hafl_app.strategies.component_mean import over_contributors
from hafl_app.strategies.factors_and_products import FactorAndProductSums
from hafl_app.strategies.product_mean import mean_of_changes


@dataclass(kw_only=True, eq=False)
class FedExLora(BaseChange):
    """FedIT's factors, and a residual in the base that makes the mean of products exact.

    With ``w_k ~ num_examples``: ``B <- sum_k w_k B_k``, ``A <- sum_k w_k A_k``, and
    ``W <- W + R``, ``R = sum_k w_k B_k A_k - B A``, of rank at most ``K r`` for K clients. The
    clients go on with components that are those of the round before.

    Differs from the paper: it weights all clients alike, for which there is
    ``federation.weighting=uniform``. It merges ``alpha / r`` times R of raw factors; here lora_B
    has the scaling folded in. Nodes keep nothing, so the residuals of all rounds travel with every
    request, at the least rank that holds them. Mixed ranks, which it leaves open, are refused.
    """

    traits = replace(BaseChange.traits, keeps_components=True, serves_mixed_ranks=False)

    def begin(self, previous: Adapter) -> FactorAndProductSums:
        """Return empty sums, of the components that can be trained."""
        return FactorAndProductSums.empty(Adapter(self.trainable(previous)), self.options)

    def accumulate(self, state: FactorAndProductSums, update: ClientUpdate) -> FactorAndProductSums:
        """Add the client's factors, and its products."""
        return state.add(update)

    def finish(self, state: FactorAndProductSums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Average the factors, and add what the product of means lacks to the base."""
        before = self.trainable(previous)
        averaged = over_contributors(state.factors, Adapter(before))
        models = mean_of_changes(state.products, before)
        merged = {}
        for name, base in self.base(previous).items():
            mean = averaged[name]
            lacking = Spectrum.of(
                models[name].add(mean, -1.0), noise=rounding_of(mean, before[name])
            )
            residual = lacking.factors(base.lora_A.dtype)
            merged[name] = mean.joined(extended(base, residual))
        return merged
