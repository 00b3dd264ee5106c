"""HAFL+, ours: HAFL's choice of components, with a step that follows the examples.

Begins where HAFL (Su, Yan and Deng, arXiv:2411.06581) breaks down under label skew: adaptive
aggregation gives what few clients train to them, whatever their share of the data.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hafl_app.fields import choice, number
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.importance import product_change_scores
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.alignment import Alignment
from hafl_app.plan_parts.module_plan import ModulePlan, TrainedFactors
from hafl_app.seeds import client_seed
from hafl_app.server.method import StrategyError, Traits
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.alternating import factor_of_round
from hafl_app.strategies.component_mean import ComponentMean, Sums, of_changes
from hafl_app.strategies.selection import ComponentSelection
from hafl_app.wire.node_profile import NodeProfile

Chosen = Mapping[str, tuple[int, ...]]
"""Module name to components, ascending."""


@dataclass(kw_only=True, eq=False)
class HaflPlus(ComponentMean):
    """HAFL with freezing, and five ingredients, each of which is a setting.

    1. *Damped step*: ``b_i += eta sum_{k: i in S_k} v_k (b_{k,i} - b_i) / (V_i^(1-e) V^e)`` and a_i
       likewise, over the components ``S_k`` that client k trains, ``V_i`` and V the weights of
       those who train i and of all: at ``e = 0`` HAFL's adaptive aggregation, at 1 the mean of
       changes.
    2. *Weight of an example*: ``v_k = n_k / |S_k|`` in place of ``n_k``, so that at ``e = 1``
       client k has the part ``n_k / N`` of the step whatever its rank.
    3. *Balanced coverage*: the server assigns components so that each is trained by about the same
       number of examples, each client getting those that it has contributed most to,
       ``||b'_i a'_i - b_i a_i||`` of its uploads, as far as they have room.
    4. *Fold*: what a client does not train stays in its forward pass.
    5. *Alternating factors*: odd rounds train lora_B, even ones lora_A, of twice as many components
       as the rank says: the same bytes up over two rounds, and no product of two changes.

    Beside them ``lora_B`` learns five times as fast as ``lora_A``: ``conf/strategy/hafl_plus.yaml``
    sets ``client.lora_B_lr_ratio``. ``model.head``, ``federation.server_optimizer`` and the
    settings of the client's loss combine with it. For models that need both factors at once, such
    as causal ones, ``factors=both``, and ``rotation_weight`` in place of a choice of components.

    Parameters
    ----------
    coverage_exponent
        ``e``, in [0, 1].
    server_step
        ``eta``, above 0.
    client_weight
        ``per_component``: ``n_k / |S_k|``. ``examples``: ``n_k``.
    selection
        ``balanced``. ``contribution``: each client's best components, however many others have
        them. ``random`` or ``prefix`` as controls.
    smoothing
        Decay of a client's contribution scores over its rounds, in [0, 1).
    fold
        False: a client receives what it trains, and nothing else.
    factors
        ``alternating`` or ``both``: then as many components as the rank says.
    rotation_weight
        Of FedRot-LoRA's soft alignment, in [0, 1], see `hafl_app.plan_parts.alignment`; 0: none. A
        rotation mixes components: only with ``selection=prefix``, ``fold=false``, ``factors=both``.
    """

    coverage_exponent: float = number(1.0, at_least=0, at_most=1)
    server_step: float = number(1.0, above=0)
    client_weight: str = choice("per_component", "per_component", "examples")
    selection: str = choice("balanced", "balanced", "contribution", "random", "prefix")
    smoothing: float = number(0.5, at_least=0, below=1)
    fold: bool = True
    factors: str = choice("alternating", "alternating", "both")
    rotation_weight: float = number(0.0, at_least=0, at_most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.traits = Traits(
            not_robust="it weighs a component by all participants",
            dp_refusal="privacy=central_dp does not cover components that are assigned by "
            "uploads without noise: use strategy=hafl strategy.selection=random"
            if self._scores_clients
            else "privacy=central_dp has no denominators for a mean of changes: use strategy=hafl "
            f"strategy.selection={self.selection}",
            coverage_exponent=self.coverage_exponent,
            sums_updates=not self._scores_clients,
            sum_refusal="its server assigns components by what single updates contributed: use "
            "strategy.selection=random or prefix",
        )
        self.contributions: dict[int, Mapping[str, Tensor]] = {}
        self._assigned = _Assignment()

    @property
    def _scores_clients(self) -> bool:
        """Whether components are assigned by what each client's uploads contributed."""
        return self.selection in ("balanced", "contribution")

    def check(self, ranks: Sequence[int]) -> None:
        """Refuse also a rotation of components that are told apart."""
        super().check(ranks)
        needed = {"selection": "prefix", "fold": False, "factors": "both"}
        for name, value in needed.items() if self.rotation_weight else ():
            if getattr(self, name) != value:
                raise StrategyError(
                    f"strategy.rotation_weight={self.rotation_weight} mixes components, and needs "
                    "strategy.selection=prefix strategy.fold=false strategy.factors=both"
                )

    # ---- plans -----------------------------------------------------------------------------

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Assign the client its components; with fold it holds all, else these."""
        factors: TrainedFactors = "both"
        if self.factors == "alternating":
            factors = factor_of_round(server_round)
        everything, scaling = tuple(range(self.max_rank)), self.scaling_of(self.max_rank)
        chosen = self._choose(profile, server_round)
        modules = {
            name: ModulePlan(everything if self.fold else own, own, scaling, factors=factors)
            for name, own in chosen.items()
        }
        return self.train_plan(modules, align=self._alignment(server_round))

    def _alignment(self, server_round: int) -> Alignment | None:
        if not self.rotation_weight or server_round == 1:  # lora_B was sent as 0
            return None
        return Alignment("B" if server_round % 2 else "A", self.rotation_weight)

    def _budgets(self, profile: NodeProfile) -> dict[str, int]:
        """Return how many components of each module a client trains."""
        times = 2 if self.factors == "alternating" else 1
        return {n: min(times * rank, self.max_rank) for n, rank in self.budgets(profile).items()}

    def _choose(self, profile: NodeProfile, server_round: int) -> Chosen:
        budgets = self._budgets(profile)
        if self.selection == "balanced":
            return self._balanced(profile, budgets, server_round)
        seed = client_seed(self.options.seed, server_round, profile.partition_id)
        if self.selection == "contribution":
            rule, scores = "importance", self._scores(profile.partition_id)
        else:
            rule, scores = self.selection, {name: torch.zeros(self.max_rank) for name in budgets}
        return ComponentSelection(rule, "module", exploration=0.0).select(budgets, scores, seed)

    def _balanced(
        self, profile: NodeProfile, budgets: Mapping[str, int], server_round: int
    ) -> Chosen:
        """Look a client up in the round's assignment to all clients that may train."""
        if not self._assigned.holds(profile, budgets, server_round):
            known = {p.partition_id: p for p in self.coordinator.participation.trainable()}
            profiles = {**known, profile.partition_id: profile}.values()
            self._assigned = self._assign(profiles, server_round)
        return self._assigned.chosen[profile.partition_id]

    def _assign(self, profiles: Iterable[NodeProfile], server_round: int) -> "_Assignment":
        clients = [
            Candidate(
                profile,
                self._budgets(profile),
                self._scores(profile.partition_id),
                random.Random(client_seed(self.options.seed, server_round, profile.partition_id)),
            )
            for profile in sorted(profiles, key=lambda p: (-p.num_examples, p.partition_id))
        ]
        chosen: dict[int, dict[str, tuple[int, ...]]] = {
            c.profile.partition_id: {} for c in clients
        }
        for name in self.global_adapter.modules:
            for client, own in zip(clients, balanced(clients, name, self.max_rank), strict=True):
                chosen[client.profile.partition_id][name] = own
        budgets = {client.profile.partition_id: client.budgets for client in clients}
        return _Assignment(server_round, budgets, chosen)

    def _scores(self, partition_id: int) -> dict[str, Tensor]:
        """Return a client's contributions; what it has not trained yet counts as the highest."""
        own, scores = self.contributions.get(partition_id, {}), {}
        for name, factors in self.global_adapter.modules.items():
            known = own.get(name, torch.full((factors.rank,), torch.nan, dtype=torch.float64))
            measured = known[known.isfinite()]
            scores[name] = known.nan_to_num(nan=measured.max().item() if len(measured) else 0.0)
        return scores

    # ---- merging ---------------------------------------------------------------------------

    def planned_weight(self, plan: TrainPlan, num_examples: int) -> float:
        """Return ``v_k``: a client's examples, by default over the components it trains."""
        if self.client_weight == "examples":
            return super().planned_weight(plan, num_examples)
        trained = sum(len(module.trainable) for module in plan.modules.values())
        return super().planned_weight(plan, num_examples) / max(trained, 1)

    def accumulate(self, state: Sums, update: ClientUpdate) -> Sums:
        """Add the client's components to their slots, and keep what it contributed to each."""
        if not self._scores_clients:
            return super().accumulate(state, update)
        known, before = self.contributions.get(update.partition_id, {}), update.before.modules
        own = {}
        for name, after in update.adapter.modules.items():
            now = product_change_scores(before[name], after).cpu()
            own[name] = self._smoothed(known.get(name), now, update.components(name))
        self.contributions[update.partition_id] = own
        return super().accumulate(state, update)

    def _smoothed(self, known: Tensor | None, now: Tensor, components: Sequence[int]) -> Tensor:
        """Return a client's scores of a module after a round, NaN where it has none."""
        scores = torch.full((self.max_rank,), torch.nan, dtype=torch.float64)
        if known is not None:
            scores = known.clone()
        mean = float(now.mean()) if len(now) else 0.0
        if mean > 0:  # relative to it, rounds of lora_A and of lora_B are alike
            slots, now = list(components), now / mean
            earlier = scores[slots]
            smoothed = self.smoothing * earlier + (1 - self.smoothing) * now
            scores[slots] = now.where(earlier.isnan(), smoothed)
        return scores

    def finish(self, state: Sums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Move every component by the damped sum of its changes."""
        self._assigned = _Assignment()
        return of_changes(state, previous, self.coverage_exponent, self.server_step)

    def memory(self) -> dict[str, Any]:
        """Return the clients' contribution scores, by partition and module."""
        return {"contributions": {str(k): dict(v) for k, v in self.contributions.items()}}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Restore those scores."""
        self.contributions = {int(k): dict(v) for k, v in memory.get("contributions", {}).items()}
        self._assigned = _Assignment()


@dataclass(frozen=True)
class _Assignment:
    """The components of all clients in a round, and the budgets that they came from."""

    server_round: int = 0
    budgets: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    chosen: Mapping[int, Chosen] = field(default_factory=dict)

    def holds(self, profile: NodeProfile, budgets: Mapping[str, int], server_round: int) -> bool:
        """Whether a client of these budgets is in it."""
        known = self.budgets.get(profile.partition_id)
        return server_round == self.server_round and known == budgets


@dataclass(frozen=True)
class Candidate:
    """A client to be assigned components: its budgets and scores by module, and its dice."""

    profile: NodeProfile
    budgets: Mapping[str, int]
    scores: Mapping[str, Tensor]
    dice: random.Random


def balanced(clients: Sequence[Candidate], module: str, rank: int) -> list[tuple[int, ...]]:
    """Assign a module's components so that all are trained by about as many examples.

    In turn, each client takes the components with its highest scores that have room for its
    examples, and those with the fewest examples for what is left of its budget. The room of a
    component is its part of all examples times budgets.

    Parameters
    ----------
    clients
        Those of the most examples first: they fit least.
    rank
        Number of components.

    Returns
    -------
    list of tuple
        The components of each client, ascending, as many as its budget says.
    """
    wanted = sum(c.profile.num_examples * c.budgets[module] for c in clients)
    room = wanted / rank * (1 + 1e-9)
    examples, assigned = [0] * rank, []
    for client in clients:
        own, number_of = client.profile.num_examples, client.budgets[module]
        scores = client.scores[module].tolist()
        ties = client.dice.sample(range(rank), rank)
        best = sorted(range(rank), key=lambda i: (-scores[i], ties[i]))
        taken = [i for i in best if examples[i] + own <= room][:number_of]
        rest = sorted((i for i in best if i not in taken), key=lambda i: examples[i])
        taken += rest[: number_of - len(taken)]
        for i in taken:
            examples[i] += own
        assigned.append(tuple(sorted(taken)))
    return assigned
