"""HAFL: importance-based freezing or truncation, and adaptive aggregation.

Su, Yan and Deng, "Federated LLMs Fine-tuned with Adaptive Importance-Aware LoRA",
arXiv:2411.06581.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hafl_app.fields import choice, number
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.component_choice import ComponentChoice
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.seeds import client_seed
from hafl_app.server.aggregation import mean_over_clients
from hafl_app.server.method import Division, StrategyError, Traits
from hafl_app.strategies.component_mean import Sums, of_changes, over_all, over_contributors
from hafl_app.strategies.importance import GRADIENT_MEASURES, ImportanceScores
from hafl_app.strategies.scored_mean import ScoredMean
from hafl_app.strategies.selection import ComponentSelection
from hafl_app.wire.node_profile import NodeProfile

_NOT_ROBUST: Mapping[str, str] = {
    "adaptive": "",
    "zero_padding": "aggregation=zero_padding counts missing components as zeros, use adaptive",
    "change": "aggregation=change weighs a component by all participants, use adaptive",
}
_DP_DIVISION: Mapping[str, Division | None] = {
    "adaptive": "contributors",
    "zero_padding": "participants",
    "change": None,
}


@dataclass(kw_only=True, eq=False)
class Hafl(ScoredMean):
    """Each client trains its budget's worth of the most important components.

    *Freezing*: every client holds the global rank, trains and uploads only the chosen components;
    the others stay in the forward pass. *Truncation*: a client receives only the chosen ones.
    *Adaptive aggregation*: a component is averaged over the clients that trained it,
    ``b_i <- sum_{k in K_i} n_k b_{k,i} / sum_{k in K_i} n_k`` and a_i likewise; one that no client
    trained keeps its value.

    Differs from the paper: its body was not available, only the abstract and second-hand
    accounts, so equations and open choices are reconstructions, and each choice is a setting. The
    server selects; in one second-hand account each client does, in both schemes, from the smoothed
    loss gradient: that is ``selection_by=client``. Where the server selects, clients measure only
    what they train and scores of frozen components stay, else a component once frozen would never
    come back. Scores of components that no client has measured yet count as the highest seen, so
    that they get a turn. All clients share one scaling.

    Parameters
    ----------
    scheme
        ``freezing`` or ``truncation``.
    aggregation
        ``adaptive``; ``zero_padding`` (divide by the weight of all participants); or ``change``,
        ours: ``b_i += eta sum_{k in K_i} n_k (b_{k,i} - b_i) / (N_i^(1-e) N^e)`` and a_i likewise,
        with ``N_i = sum_{k in K_i} n_k``, N of all participants, e the ``coverage_exponent``.
    coverage_exponent
        ``e`` of ``change``, in [0, 1]: at 0 it is adaptive aggregation, at 1 the mean of changes
        over all participants, under which few clients do not decide what they alone trained.
    server_step
        ``eta`` of ``change``, above 0.
    selection
        ``importance``, ``random`` or ``prefix``, see `hafl_app.strategies.selection`.
    selection_by
        ``server``: for all clients by scores that it averages. ``client``: each by its own, which
        it measures before training on ``probe_batches`` batches, 0: one pass, and keeps to
        itself. It then receives all components in both schemes, and drops what it did not choose
        under ``truncation``.
    scope
        ``module``: the budget holds in every module. ``model``: the sum of all modules' budgets,
        spent on the best components of the whole model.
    importance
        ``sensitivity`` (|w g|), ``smoothed`` (its moving average), ``adalora`` (times
        uncertainty), ``magnitude`` (||b_i|| ||a_i||) or ``contribution`` (||delta b_i|| ||a_i||).
    source
        ``client``: measured from real gradients while training. ``server``: from the round's
        parameter change over the learning rate. Magnitude and contribution need no upload.
    smoothing
        Decay of the moving averages over steps and rounds, in [0, 1).
    exploration
        Share of a client's components drawn at random, in [0, 1].
    probe_batches
        Batches on which a client first measures *all* components it holds; 0 for none.
    learning_rate, lora_B_lr_ratio
        The clients', for ``source=server``.
    """

    scheme: str = choice("freezing", "freezing", "truncation")
    aggregation: str = choice("adaptive", *_NOT_ROBUST)
    coverage_exponent: float = number(1.0, at_least=0, at_most=1)
    server_step: float = number(1.0, above=0)
    selection: str = choice("importance", "importance", "random", "prefix")
    selection_by: str = choice("server", "server", "client")
    scope: str = choice("module", "module", "model")
    importance: str = choice("smoothed", *GRADIENT_MEASURES, "magnitude", "contribution")
    source: str = choice("client", "client", "server")
    smoothing: float = number(0.85, at_least=0, below=1)
    exploration: float = number(0.1, at_least=0, at_most=1)
    probe_batches: int = number(0, at_least=0)
    learning_rate: float = number(3e-3, above=0)
    lora_B_lr_ratio: float = number(1.0, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.traits = self._declare()

    def new_scores(self) -> ImportanceScores:
        """Return scores that are measured where and as the settings say."""
        return ImportanceScores(
            measure=self.importance if self._scores_on_server else "none",
            by_server=self.source == "server",
            smoothing=self.smoothing,
            learning_rate=self.learning_rate,
            lora_B_lr_ratio=self.lora_B_lr_ratio,
        )

    @property
    def _by_client(self) -> bool:
        return self.selection_by == "client"

    @property
    def _scores_on_server(self) -> bool:
        return self.selection == "importance" and not self._by_client

    @property
    def _sums_choices(self) -> bool:
        """Whether clients choose, and the sum over all does not depend on who has chosen what."""
        over_all = self.aggregation == "change" and self.coverage_exponent == 1
        return self._by_client and over_all

    def _declare(self) -> Traits:
        by_uploads = self._by_client or (self._scores_on_server and self.importance != "magnitude")
        return replace(
            self.traits,
            uploads_importance=self.scores.from_gradients or self._by_client,
            trains_global_rank=self._by_client,  # in its probe
            not_robust=_NOT_ROBUST[self.aggregation],
            coverage_exponent={"adaptive": 0.0, "zero_padding": 2.0}.get(
                self.aggregation, self.coverage_exponent
            ),
            sums_updates=not by_uploads or self._sums_choices,
            sum_refusal="clients choose, and it divides by who has chosen a component, which is "
            "hidden: use strategy.aggregation=change strategy.coverage_exponent=1, or "
            "strategy.selection_by=server"
            if self._by_client
            else "its server scores single updates: use strategy.importance=magnitude, or "
            "strategy.selection=random or prefix",
            dp_division=None if by_uploads else _DP_DIVISION[self.aggregation],
            dp_refusal="privacy=central_dp does not cover components that clients choose by their "
            "data: use strategy.selection_by=server"
            if self._by_client
            else f"privacy=central_dp does not cover importance={self.importance}, which "
            "chooses components from uploads without noise: use strategy.importance=magnitude, or "
            "strategy.selection=random or prefix"
            if by_uploads
            else "privacy=central_dp has no denominators for aggregation=change: use "
            "strategy.aggregation=adaptive",
        )

    def check(self, ranks: Sequence[int]) -> None:
        """Refuse also what no client can choose by."""
        super().check(ranks)
        if not self._by_client:
            return
        for name, given, needed in (
            ("selection", self.selection, ("importance",)),
            ("importance", self.importance, (*GRADIENT_MEASURES, "contribution")),
            ("source", self.source, ("client",)),
        ):
            if given not in needed:
                raise StrategyError(
                    f"strategy.{name}={given} is refused with strategy.selection_by=client, which "
                    f"needs {', '.join(needed)}"
                )
        if self.options.federation.upload == "mixed":
            raise StrategyError(
                "federation.upload=mixed is refused with strategy.selection_by=client: the server "
                "gives each component its bits, and does not know which the client chooses"
            )

    # ---- plans -----------------------------------------------------------------------------

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Choose the client's components, or let it; with freezing it holds all, else these."""
        if self._by_client:
            return self._plan_of_choice(profile)
        measured = self.scores.from_gradients
        return self.train_plan(
            self.module_plans(profile, server_round),
            importance=self.importance if measured else "none",
            importance_smoothing=self.smoothing,
            probe_batches=self.probe_batches if measured else 0,
        )

    def _plan_of_choice(self, profile: NodeProfile) -> TrainPlan:
        everything, scaling = tuple(range(self.max_rank)), self.scaling_of(self.max_rank)
        rule = ComponentChoice(
            self.importance,
            self.scope,
            self.probe_batches,
            self.smoothing,
            self.exploration,
            drops_rest=self.scheme == "truncation",
        )
        modules = {
            name: ModulePlan(everything, everything, scaling, budget=budget)
            for name, budget in self.budgets(profile).items()
        }
        return self.train_plan(modules, choice=rule)

    def module_plans(self, profile: NodeProfile, server_round: int) -> Mapping[str, ModulePlan]:
        """Choose the held and the trained components of each module."""
        scaling = self.scaling_of(self.max_rank)
        everything = tuple(range(self.max_rank))
        selection = ComponentSelection(self.selection, self.scope, self.exploration)
        seed = client_seed(self.options.seed, server_round, profile.partition_id)
        selected = selection.select(self.budgets(profile), self.selection_scores(), seed)
        return {
            name: ModulePlan(
                everything if self.scheme == "freezing" else components, components, scaling
            )
            for name, components in selected.items()
        }

    def selection_scores(self) -> dict[str, Tensor]:
        """Score the components for selection, by module: all equal unless importance chooses."""
        return self.scores.of(self.global_adapter)

    # ---- merging ---------------------------------------------------------------------------

    def finish(self, state: Sums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Average by the chosen rule, then update the scores of what was trained."""
        merged = self._averaged(state, previous)
        trained = {n: torch.nonzero(s.weight > 0).flatten().tolist() for n, s in state.items()}
        self.scores.end_round(
            previous,
            merged,
            trained,
            self.scaling_of(self.max_rank),
            lambda values, weights: mean_over_clients(values, weights, self.options),
        )
        return merged

    def _averaged(self, state: Sums, previous: Adapter) -> dict[str, LoraFactors]:
        if self.aggregation == "change":
            return of_changes(state, previous, self.coverage_exponent, self.server_step)
        return (over_contributors if self.aggregation == "adaptive" else over_all)(state, previous)

    def memory(self) -> dict[str, Any]:
        """Return the scores of all components."""
        return self.scores.memory()

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Restore earlier scores."""
        self.scores.recall(memory)
