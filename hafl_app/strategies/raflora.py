"""raFLoRA: average the dense updates rank by rank, each over the clients that reach it.

Wu et al., "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity",
arXiv:2602.13486.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.product_sum import ProductSum, truncated_sums
from hafl_app.plan import TrainPlan
from hafl_app.strategies.kept_updates import KeptUpdates, Updates
from hafl_app.strategies.product_mean import OF_PRODUCTS
from hafl_app.wire.node_profile import NodeProfile


@dataclass(kw_only=True, eq=False)
class RaFlora(KeptUpdates):
    """FlexLoRA whose divisor follows the rank: high components are not diluted.

    The ranks that occur cut the components into blocks ``(l, h]``. With ``w_k ~ num_examples``,

    ``M <- trunc(sum_h sum_{r_k >= h} w_k B_k[:, l:h] A_k[l:h, :] / sum_{r_k >= h} w_k)``

    where FlexLoRA divides by all clients, so that singular value i shrinks each round by the share
    of the clients that hold it, and the update collapses to the lowest rank. ``trunc`` keeps
    ``max_rank`` singular values as ``lora_B = U S``, ``lora_A = V^T``; a client of rank r receives
    the first r.

    Reconstruction: the paper was read in its abstract and in re-implementations. A block that
    no client covers in a round stays as it was, where a plain sum would lose it. All components of
    a block have the same clients, so the mean is taken component by component, and the blocks are
    the same whoever takes part. A re-implementation splits the singular values' square root between
    both factors; where they are 0 neither could learn again. Every upload is kept until the round
    ends, also while streaming: the divisors are known only then.

    RB-LoRA (Ha et al., "RB-LoRA: Rank-Balanced Aggregation for Low-Rank Adaptation with Federated
    Fine-Tuning", Findings of EACL 2026), as its project page has it, weights component i of client
    k by ``w_k / sum_{r_j >= i} w_j``, its share of the data times the component's rarity, and
    projects by SVD: over the same clients that is this rule. Its released code does not apply the
    weights.
    """

    traits = replace(
        OF_PRODUCTS,
        not_robust="it averages products over those who reach a component",
        coverage_exponent=0.0,
    )

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client holds and trains the largest components, as many as its rank allows."""
        return self.prefix_plan(self.budgets(profile))

    def finish(self, state: Updates, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Divide each component by the weight of those who trained it, and decompose."""
        sums = [_rank_by_rank(state, name, f) for name, f in previous.modules.items()]
        dtype = next(iter(previous.modules.values())).lora_A.dtype
        return dict(zip(previous.modules, truncated_sums(sums, self.max_rank, dtype), strict=True))


def _rank_by_rank(updates: Updates, name: str, previous: LoraFactors) -> ProductSum:
    """Return a module's sum of block means, with the components that no client trained."""
    weight = previous.lora_A.new_zeros(previous.rank, dtype=torch.float64)
    for update in updates:
        weight[list(update.components(name))] += update.num_examples
    uncovered = torch.nonzero(weight == 0).flatten().tolist()
    total = ProductSum().add(previous.select(uncovered), 1.0)
    for update in updates:
        factors = update.adapter.modules[name]
        shares = update.num_examples / weight[list(update.components(name))]
        scaled = factors.lora_B * shares.to(factors.lora_B.dtype)
        total = total.add(LoraFactors(factors.lora_A, scaled), 1.0)
    return total
