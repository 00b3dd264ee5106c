"""Rank allocation in the style of FedARA: a budget over the whole model that shrinks by rounds.

Wu, Hu, Min and Wang, "Adaptive Rank Allocation for Federated Parameter-Efficient Fine-Tuning of
Language Models", arXiv:2501.14406. A reconstruction: of the paper its abstract was read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hafl_app.fields import choice, number
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.selection import select_within
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.seeds import client_seed
from hafl_app.server.aggregation import mean_over_clients
from hafl_app.server.method import Traits
from hafl_app.strategies.component_mean import Sums, over_contributors
from hafl_app.strategies.importance import GRADIENT_MEASURES, ImportanceScores
from hafl_app.strategies.scored_mean import ScoredMean
from hafl_app.wire.node_profile import NodeProfile


@dataclass(kw_only=True, eq=False)
class FedAra(ScoredMean):
    """The least important components of the whole model are pruned for good, round by round.

    Of N modules with ``max_rank`` components each, round t of T keeps the b(t) most important,

    ``b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3``, ``b_0 = N max_rank``,
    ``b_T = N target_rank``,

    ``b_0`` up to round ``t_i`` and ``b_T`` in the last ``t_f``. A module without a component left
    is not adapted any more. A client holds what is left, and trains the most important of it
    within the sum of its budgets; a component is averaged over the clients that trained it.
    Importance is measured by the clients from their gradients, averaged, and smoothed over rounds.

    Differs from the paper: its adapter is ``B E A`` with a trained diagonal E and regularized
    factors; this is LoRA's ``B A``. The schedule is AdaLoRA's (arXiv:2303.10512), the score and
    the server's choice are HAFL's: the paper's own could not be read. It has one rank for all.

    Parameters
    ----------
    target_rank
        Mean components of a module in the end, at least 1; above ``max_rank`` nothing is pruned.
    warmup_rounds, final_rounds
        ``t_i`` and ``t_f``, rounds of the full and of the final budget; at least 1 and 0.
    importance
        ``sensitivity``, ``smoothed`` or ``adalora``, see `hafl_app.lowrank.importance`.
    smoothing
        Decay of the moving averages over steps and rounds, in [0, 1).
    """

    traits = Traits(
        not_robust="",
        dp_refusal="privacy=central_dp does not cover components that are pruned by scores without "
        "noise: use strategy=hafl strategy.importance=magnitude",
        uploads_importance=True,
        sum_refusal="clients upload importance scores, one by one",
        coverage_exponent=0.0,
    )

    target_rank: int = number(2, at_least=1)
    warmup_rounds: int = number(2, at_least=1)
    final_rounds: int = number(0, at_least=0)
    importance: str = choice("smoothed", *GRADIENT_MEASURES)
    smoothing: float = number(0.85, at_least=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pruned: dict[str, Tensor] = {}
        self.rounds = 0

    def new_scores(self) -> ImportanceScores:
        """Return scores that clients measure from their gradients."""
        return ImportanceScores(self.importance, False, self.smoothing, 1.0, 1.0)

    def budget(self, server_round: int) -> int:
        """Return b(t), the components of the whole model in a round."""
        modules, rounds = len(self.global_adapter.modules), self.options.federation.num_rounds
        first, last = modules * self.max_rank, modules * min(self.target_rank, self.max_rank)
        if server_round <= self.warmup_rounds:
            return first
        shrinking = rounds - self.warmup_rounds - self.final_rounds
        past = (server_round - self.warmup_rounds) / shrinking if shrinking > 0 else 1.0
        return round(last + (first - last) * (1 - min(past, 1.0)) ** 3)

    def left(self) -> dict[str, list[int]]:
        """Return the components of each module that are not pruned."""
        none = torch.zeros(self.max_rank, dtype=torch.bool)
        return {
            name: torch.nonzero(~self.pruned.get(name, none)).flatten().tolist()
            for name in self.global_adapter.modules
        }

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client holds what is left, and trains the best of it within its budget."""
        left, scaling = self.left(), self.scaling_of(self.max_rank)
        total = min(sum(self.budgets(profile).values()), sum(map(len, left.values())))
        seed = client_seed(self.options.seed, server_round, profile.partition_id)
        trained = self._best(left, self.scores.of(self.global_adapter), total, seed)
        modules = {n: ModulePlan(tuple(left[n]), trained[n], scaling) for n in left}
        return self.train_plan(
            modules, importance=self.importance, importance_smoothing=self.smoothing
        )

    def finish(self, state: Sums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Average over contributors, update the scores, and prune down to the next budget."""
        merged = over_contributors(state, previous)
        mean = lambda values, weights: mean_over_clients(values, weights, self.options)  # noqa: E731
        self.scores.end_round(previous, merged, {}, 1.0, mean)
        self.rounds += 1
        self._prune(previous)
        return {name: self._without_pruned(name, factors) for name, factors in merged.items()}

    def _prune(self, previous: Adapter) -> None:
        # After the last round no client trains with less: the adapter stays as it was trained.
        next_round = min(self.rounds + 1, self.options.federation.num_rounds)
        left, budget = self.left(), self.budget(next_round)
        if budget >= sum(map(len, left.values())):
            return
        kept = self._best(left, self.scores.of(previous), budget, self.options.seed)
        for name, components in kept.items():
            pruned = torch.ones(self.max_rank, dtype=torch.bool)
            pruned[list(components)] = False
            self.pruned[name] = pruned

    def _best(
        self, left: Mapping[str, list[int]], scores: Mapping[str, Tensor], total: int, seed: int
    ) -> dict[str, tuple[int, ...]]:
        """Return the best components of those that are left, by module, ascending."""
        known = {name: scores[name][components] for name, components in left.items()}
        positions = select_within({"model": total}, known, "model", 0.0, seed)
        return {n: tuple(left[n][position] for position in positions[n]) for n in left}

    def _without_pruned(self, name: str, factors: LoraFactors) -> LoraFactors:
        """Return factors whose pruned components do nothing."""
        if name not in self.pruned:
            return factors
        return LoraFactors(factors.lora_A, factors.lora_B.where(~self.pruned[name], 0.0))

    def memory(self) -> dict[str, Any]:
        """Return the scores, what is pruned, and how many rounds have been merged."""
        rounds = torch.tensor(self.rounds)
        return {"scores": self.scores.memory(), "pruned": dict(self.pruned), "rounds": rounds}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Restore what `memory` returned."""
        self.scores.recall(memory.get("scores", {}))
        self.pruned = dict(memory.get("pruned", {}))
        self.rounds = int(memory.get("rounds", 0))
