"""HetLoRA: prefix truncation, local rank self-pruning, sparsity-weighted aggregation.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
EMNLP 2024, arXiv:2401.06432.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hafl_app.fields import choice, number
from hafl_app.lowrank.components import ComponentSums
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.product_norms import product_norms
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.own_weight import NORM_SCOPES, NORMS_OF, OwnWeight
from hafl_app.plan_parts.tail_pruning import TailPruning
from hafl_app.server.method import Traits
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.wire.node_profile import NodeProfile

_NORM_WEIGHTS = "sparsity-weighted aggregation, arXiv:2401.06432: a norm is the weight"


@dataclass(frozen=True)
class ModuleSums:
    """A module's fold: sums by both weightings, and the largest rank that a participant held."""

    by_norm: ComponentSums
    by_examples: ComponentSums
    largest_rank: int = 0


@dataclass(kw_only=True, eq=False)
class HetLora(HeterogeneousLora):
    """Clients with large updates count more, and drop components that they do not need.

    1. *Truncation*: client k holds the first ``r_k`` components.
    2. *Self-pruning*: it minimizes ``F_k + lambda ||B[:, g:]||_F ||A[g:, :]||_F`` with
       ``g = max(r_min, floor(gamma r_k))``. If that norm product is lower after training than
       before, it uploads the first g components only, and ``r_k <- g`` for good.
    3. *Sparsity-weighted aggregation*: with missing components as zeros,
       ``B <- sum_k phi_k B_k``, ``A <- sum_k phi_k A_k``,
       ``phi_k = ||B_k A_k||_F / sum_j ||B_j A_j||_F`` over the participants. If all norms are 0,
       ``phi_k ~ num_examples``.

    While local change is small, the product of component i shrinks each round by ``f_i^2``,
    where ``f_i`` is the phi of the clients that hold it: norm weights change f, not the law.

    The paper writes ``Delta W_k = B_k A_k`` and no scaling. Here ``B_k`` has PEFT's folded in,
    in the average and in phi, so that ``Delta W_k`` is what client k adds to the base; with one
    scaling for all it cancels. Under ``lora.scaling=per_rank`` or ``rslora`` it does not, and a
    mean of raw factors would be another method: see `ZeroPadding` for why it is not this one. The
    tail's norms alone are of the factors that a client trains, where its loss has them.

    Reconstruction: the paper's body was not available to us, so the form is that of accounts and
    re-implementations of it. Each module prunes for itself, where the paper has one rank
    per client. The server remembers the ranks, by partition. Components from the round's
    largest dispatched rank on keep their value, where the paper's global rank shrinks to it.
    Those that all their holders pruned become zero in lora_B and keep lora_A. The head is
    averaged by num_examples.

    Under ``privacy=secure_aggregation`` a client computes its norm itself and masks it beside what
    it weighs: the server learns ``sum_k phi_k B_k``, ``sum_k phi_k A_k`` and ``sum_k phi_k``, the
    last over the clients of each rank, and cannot check a norm. Without pruning, whose ranks it
    would have to know before masks are agreed on.

    Parameters
    ----------
    pruning
        Whether clients prune.
    regularizer
        Whether the tail's norm product is in the loss. Without it a tail shrinks by chance alone.
    decay
        ``gamma`` in (0, 1]. The paper's best, 0.99, takes off one component at a time up to rank
        100, and 1 none.
    tail_weight
        ``lambda``, of the sum over modules, at least 0. The paper's value is not known; 0.01 is
        a re-implementation's. Ranks fall fast with it: on a tiny model from 8 to 3 in 8 rounds.
    min_rank
        ``r_min``: no module is pruned below it. The default is the weakest client's rank in
        ``ranks=haflq``.
    weighting
        ``norm``, or ``examples`` as the ablation.
    norm_scope
        ``module``: phi in each module of its own. ``client``: one phi, of the norms' sum over
        modules.
    norm_of
        ``state``: of ``B_k A_k``, as in the paper. ``change``: of ``B_k A_k - sent_k``; pruned
        components count as changed to zero.
    """

    traits = Traits(
        not_robust="its clients are weighted by their norm, and a robust rule has no weights",
        dp_refusal="privacy=central_dp does not cover weights by norm and ranks by pruning, which "
        "follow from uploads without noise: use strategy=zero_padding",
        coverage_exponent=2.0,
        breaks={
            "homogeneous form": _NORM_WEIGHTS,
            "num_examples": _NORM_WEIGHTS,
            "split clients": _NORM_WEIGHTS,
        },
    )

    pruning: bool = True
    regularizer: bool = True
    decay: float = number(0.99, above=0, at_most=1)
    tail_weight: float = number(0.01, at_least=0)
    min_rank: int = number(2, at_least=1)
    weighting: str = choice("norm", "norm", "examples")
    norm_scope: str = choice("module", *NORM_SCOPES)
    norm_of: str = choice("state", *NORMS_OF)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.traits = replace(
            self.traits,
            sums_updates=not self.pruning,
            sum_refusal="training decides the rank of an upload, after masks are agreed on: use "
            "strategy.pruning=false",
        )
        self.pruned_ranks: dict[tuple[int, str], int] = {}

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client holds and trains the prefix that its budget and its pruning have left."""
        ranks = {
            name: min(budget, self.pruned_ranks.get((profile.partition_id, name), budget))
            for name, budget in self.budgets(profile).items()
        }
        masked = self.options.privacy.secure_aggregation and self.weighting == "norm"
        return self.prefix_plan(ranks, tail=self._tail(), own_weight=self._rule if masked else None)

    def memory(self) -> dict[str, Any]:
        """Return the pruned ranks by partition and module."""
        ranks: dict[str, dict[str, Tensor]] = {}
        for (partition_id, name), rank in self.pruned_ranks.items():
            ranks.setdefault(str(partition_id), {})[name] = torch.tensor(rank)
        return {"pruned_ranks": ranks}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Restore the pruned ranks."""
        self.pruned_ranks = {
            (int(partition_id), name): int(rank)
            for partition_id, ranks in memory.get("pruned_ranks", {}).items()
            for name, rank in ranks.items()
        }

    def _tail(self) -> TailPruning | None:
        if not (self.pruning or self.regularizer):
            return None
        weight = self.tail_weight if self.regularizer else 0.0
        return TailPruning(self.decay, weight, self.min_rank, self.pruning)

    def begin(self, previous: Adapter) -> Mapping[str, ModuleSums]:
        """Return empty sums for every module."""
        return {
            name: ModuleSums(ComponentSums.zeros(factors), ComponentSums.zeros(factors))
            for name, factors in previous.modules.items()
        }

    def accumulate(
        self, state: Mapping[str, ModuleSums], update: ClientUpdate
    ) -> Mapping[str, ModuleSums]:
        """Add the client's components by both weightings, and remember its ranks."""
        norms = self.norms(update)
        added = {}
        for name, sums in state.items():
            factors, components = update.adapter.modules[name], update.components(name)
            held = len(update.plan.modules[name].trainable)
            if factors.rank < held:
                self.pruned_ranks[update.partition_id, name] = factors.rank
            added[name] = ModuleSums(
                sums.by_norm.add(factors, components, norms[name]),
                sums.by_examples.add(factors, components, float(update.num_examples)),
                max(sums.largest_rank, held),
            )
        return added

    def finish(
        self, state: Mapping[str, ModuleSums], previous: Adapter
    ) -> Mapping[str, LoraFactors]:
        """Divide by the weight of all participants; components that none of them held stay."""
        merged = {}
        for name, sums in state.items():
            before = previous.modules[name]
            use_norms = self.weighting == "norm" and sums.by_norm.total_weight > 0
            chosen = sums.by_norm if use_norms else sums.by_examples
            beyond = range(sums.largest_rank, before.rank)
            averaged = chosen.average_over_all(before)
            merged[name] = averaged.replace(beyond, before.select(beyond))
        return merged

    def weight(self, update: ClientUpdate) -> float:
        """Return a client's weight over all modules; in each it has one of its own, its `norms`."""
        return (
            super().weight(update)
            if self.weighting == "examples"
            else sum(self.norms(update).values())
        )

    def norms(self, update: ClientUpdate) -> dict[str, float]:
        """Return the client's unnormalized phi by module; its own word in a secure sum."""
        if update.own_weights:
            return dict(update.own_weights)
        return product_norms(update.adapter, update.sent, self._rule)

    @property
    def _rule(self) -> OwnWeight:
        return OwnWeight(self.norm_of, self.norm_scope)
