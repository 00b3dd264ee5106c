"""HAFL: importance-based freezing or truncation, and adaptive aggregation.

Su, Yan and Deng, "Federated LLMs Fine-tuned with Adaptive Importance-Aware LoRA",
arXiv:2411.06581.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hafl_app.fields import choice, number
from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.importance import (
    SensitivityAverages,
    component_scores,
    contribution_scores,
    magnitude_scores,
    round_sensitivity,
    select_components,
    select_over_model,
)
from hafl_app.lowrank.robust import robust_mean
from hafl_app.plan import ModulePlan, TrainPlan
from hafl_app.seeds import client_seed
from hafl_app.server.central_privacy import Division
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.component_mean import ComponentAveraging, Sums
from hafl_app.strategies.hooks import StrategyError
from hafl_app.wire.node_profile import NodeProfile

Scored = tuple[tuple[int, ...], Tensor]
"""Components of a module, and a score for each."""
Measured = Mapping[str, Scored]
_GRADIENT_MEASURES = ("sensitivity", "smoothed", "adalora")


@dataclass(kw_only=True, eq=False)
class Hafl(ComponentAveraging):
    """Each client trains its budget's worth of the most important components.

    *Freezing*: everybody holds the global rank, trains and uploads only the chosen components;
    the others stay in the forward pass. *Truncation*: a client receives only the chosen ones.
    *Adaptive aggregation*: a component is averaged over the clients that trained it,
    ``b_i <- sum_{k in K_i} n_k b_{k,i} / sum_{k in K_i} n_k`` and a_i likewise; one that nobody
    trained keeps its value.

    Differs from the paper: its body was not available, only the abstract and second-hand
    accounts, so equations and open choices are reconstructions, and each choice is a setting. The
    server selects. Clients measure only what they train and scores of frozen components stay,
    else a component once frozen would never come back. Scores of components that nobody has
    measured yet count as the highest seen, so that they get a turn. All clients share one scaling.

    Parameters
    ----------
    scheme
        ``freezing`` or ``truncation``.
    aggregation
        ``adaptive`` or ``zero_padding`` (divide by everybody's weight).
    selection
        ``importance``, or as controls ``random`` (anew each round) or ``prefix``.
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
    aggregation: str = choice("adaptive", "adaptive", "zero_padding")
    selection: str = choice("importance", "importance", "random", "prefix")
    scope: str = choice("module", "module", "model")
    importance: str = choice("smoothed", *_GRADIENT_MEASURES, "magnitude", "contribution")
    source: str = choice("client", "client", "server")
    smoothing: float = number(0.85, at_least=0, below=1)
    exploration: float = number(0.1, at_least=0, at_most=1)
    probe_batches: int = number(0, at_least=0)
    learning_rate: float = number(3e-3, above=0)
    lora_B_lr_ratio: float = number(1.0, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scores: dict[str, Tensor] = {}
        self._measured: list[tuple[float, Measured]] = []  # of this round: a weight, and scores
        self._averages: dict[str, SensitivityAverages] = {}

    # ---- plans -----------------------------------------------------------------------------

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Choose the client's components; with freezing it holds all, else only these."""
        modules = self.module_plans(profile, server_round)
        from_gradients = (
            self.selection == "importance"
            and self.source == "client"
            and self.importance in _GRADIENT_MEASURES
        )
        return self.train_plan(
            modules,
            importance=self.importance if from_gradients else "none",
            importance_smoothing=self.smoothing,
            probe_batches=self.probe_batches if from_gradients else 0,
        )

    def module_plans(self, profile: NodeProfile, server_round: int) -> Mapping[str, ModulePlan]:
        """Return what a client holds and trains of each module."""
        scaling = self.scaling_of(self.max_rank)
        everything = tuple(range(self.max_rank))
        return {
            name: ModulePlan(
                everything if self.scheme == "freezing" else components, components, scaling
            )
            for name, components in self.select(profile, server_round).items()
        }

    def robust_reason(self) -> str:
        """Return why the robust rules have no meaning here, if they have none."""
        if self.aggregation == "adaptive":
            return ""
        return "aggregation=zero_padding counts missing components as zeros, use adaptive"

    def private_division(self) -> Division:
        """Divide by the chosen rule, if no upload beside the change chooses components."""
        if self.selection == "importance" and self.importance != "magnitude":
            raise StrategyError(
                f"strategy=hafl: privacy=central_dp does not cover importance={self.importance}, "
                "which chooses components from uploads without noise: use "
                "strategy.importance=magnitude, or strategy.selection=random or prefix"
            )
        return "contributors" if self.aggregation == "adaptive" else "everybody"

    def select(self, profile: NodeProfile, server_round: int) -> dict[str, tuple[int, ...]]:
        """Return the components that a client trains, by module."""
        budgets = self.budgets(profile)
        if self.selection == "prefix":
            return {name: tuple(range(budget)) for name, budget in budgets.items()}
        seed = client_seed(self.options.seed, server_round, profile.partition_id)
        generator = torch.Generator().manual_seed(seed)
        scores = self.selection_scores()
        if self.scope == "model":
            return select_over_model(
                scores, sum(budgets.values()), explore=self.exploration, generator=generator
            )
        return {
            name: select_components(
                scores[name], budget, explore=self.exploration, generator=generator
            )
            for name, budget in budgets.items()
        }

    def selection_scores(self) -> dict[str, Tensor]:
        """Return by what components are chosen, by module: equal unless importance chooses."""
        return self._known_scores() if self.selection == "importance" else self._ties()

    def _ties(self) -> dict[str, Tensor]:
        return {n: torch.zeros(self.max_rank) for n in self.global_adapter.modules}

    def _known_scores(self) -> dict[str, Tensor]:
        """Return the scores, components without one at the top of their module."""
        if self.importance == "magnitude":
            return {n: magnitude_scores(f) for n, f in self.global_adapter.modules.items()}
        known = {}
        for name, ties in self._ties().items():
            scores = self.scores.get(name, torch.full_like(ties, torch.nan, dtype=torch.float64))
            measured = scores[scores.isfinite()]
            highest = measured.max().item() if len(measured) else 0.0
            known[name] = scores.nan_to_num(nan=highest)
        return known

    def memory(self) -> dict[str, Any]:
        """Return the scores, and of ``source=server`` the averages that they come from."""
        averages = {name: averages.to_tensors() for name, averages in self._averages.items()}
        return {"scores": dict(self.scores), "averages": averages}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Take back scores and averages."""
        self.scores = dict(memory.get("scores", {}))
        self._averages = {
            name: SensitivityAverages.from_tensors(tensors, self.smoothing, self.smoothing)
            for name, tensors in memory.get("averages", {}).items()
        }

    # ---- merging ---------------------------------------------------------------------------

    def begin(self) -> Sums:
        """Return empty sums, and forget the last round's measurements."""
        self._measured = []
        return super().begin()

    def accumulate(self, state: Sums, update: ClientUpdate) -> Sums:
        """Add the client's components to their slots, and keep what it says of importance."""
        if (measure := self._measure()) is not None:
            scores = {name: measure(update, name) for name in self.global_adapter.modules}
            self._measured.append((float(update.num_examples), scores))
        return super().accumulate(state, update)

    def finish(self, state: Sums) -> Mapping[str, LoraFactors]:
        """Average by the chosen rule, then update the scores of what was trained."""
        merged = (
            self.over_contributors(state)
            if self.aggregation == "adaptive"
            else self.over_all(state)
        )
        if self._measure() is not None:
            self._average_scores()
        elif self.selection == "importance" and self.importance != "magnitude":
            self._score_change(merged, state)
        self._measured = []
        return merged

    def _measure(self) -> Callable[[ClientUpdate, str], Scored] | None:
        """Return what reads components and their scores off an upload, if anything does."""
        if self.selection != "importance" or self.importance == "magnitude":
            return None
        if self.importance == "contribution":
            return _contributions
        return _uploaded_scores if self.source == "client" else None

    def _average_scores(self) -> None:
        """Average the clients' scores, then smooth over rounds; unmeasured components stay."""
        decay = 0.0 if self.importance == "sensitivity" else self.smoothing
        weights = torch.tensor([weight for weight, _ in self._measured], dtype=torch.float64)
        for name in self.global_adapter.modules:
            values = torch.full((len(weights), self.max_rank), torch.nan, dtype=torch.float64)
            for row, (_, measured) in zip(values, self._measured, strict=True):
                components, scores = measured[name]
                row[list(components)] = scores.double()
            now = self._mean_score(values, weights)
            before = self.scores.get(name, torch.full_like(now, torch.nan))
            smoothed = torch.where(before.isfinite(), decay * before + (1 - decay) * now, now)
            self.scores[name] = torch.where(now.isfinite(), smoothed, before)

    def _mean_score(self, values: Tensor, weights: Tensor) -> Tensor:
        """Return the mean score of each component, NaN where nobody measured one.

        Parameters
        ----------
        values
            Shape (clients, max_rank); NaN where a client has none.
        weights
            Shape (clients,).
        """
        if self.options.robust != "none":  # or one liar's scores would steer everybody's plan
            return robust_mean(values, self.options.robust, self.options.trim_fraction)
        measured = weights[:, None] * values.isfinite()
        return (weights[:, None] * values.nan_to_num()).sum(0) / measured.sum(0)

    def _score_change(self, merged: Mapping[str, LoraFactors], state: Sums) -> None:
        """Score what was trained by the round's change, with the scaling unfolded."""
        unfold = 1 / self.scaling_of(self.max_rank)
        for name, before in self.global_adapter.modules.items():
            trained = torch.nonzero(state[name].weight > 0).flatten().tolist()
            change = round_sensitivity(
                before.select(trained).scale(unfold),
                merged[name].select(trained).scale(unfold),
                self.learning_rate,
                self.lora_B_lr_ratio,
            )
            averages = self._averages.get(name) or SensitivityAverages.zeros(
                before, self.smoothing, self.smoothing
            )
            self._averages[name] = averages = averages.update(change, trained)
            scores = component_scores(averages, self.importance, bias_correction=True)  # type: ignore[arg-type]
            self.scores[name] = scores.where(averages.steps > 0, torch.nan)


def _uploaded_scores(update: ClientUpdate, module: str) -> Scored:
    """Return what the client measured: of the components it trained, or all it held (probe)."""
    plan = update.plan.modules[module]
    components = plan.held if update.plan.probe_batches else plan.trainable
    return components, update.importance.get(module, torch.zeros(len(components)))


def _contributions(update: ClientUpdate, module: str) -> Scored:
    after = update.adapter.modules[module]
    slots = update.plan.modules[module].trainable_slots[: after.rank]
    before = update.sent.modules[module].select(slots)
    return update.components(module), contribution_scores(before, after)
