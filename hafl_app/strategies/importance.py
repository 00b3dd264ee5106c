"""Importance scores of the components: measured in a round, smoothed over rounds, remembered."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.importance import (
    ScoreKind,
    SensitivityAverages,
    component_scores,
    contribution_scores,
    magnitude_scores,
    round_sensitivity,
)
from hafl_app.server.update import ClientUpdate

GRADIENT_MEASURES = ("sensitivity", "smoothed", "adalora")

Scored = tuple[tuple[int, ...], Tensor]
"""Components of a module, and a score for each."""
MeanOverClients = Callable[[Tensor, Tensor], Tensor]
"""From values (clients, components), NaN if not measured, and weights (clients,) to their means."""


@dataclass
class ImportanceScores:
    """Scores of all components by module; components that no client has measured have none.

    Parameters
    ----------
    measure
        ``sensitivity``, ``smoothed``, ``adalora``, ``magnitude`` or ``contribution``, see
        `hafl_app.lowrank.importance`; ``none`` keeps all components tied.
    by_server
        Whether gradients are replaced by the round's change over the learning rate.
    smoothing
        Decay of the moving averages over rounds, in [0, 1).
    learning_rate, lora_B_lr_ratio
        The clients', with ``by_server``.

    Attributes
    ----------
    values
        Module name to scores, shape (rank,), NaN where a component has never been measured.
    """

    measure: str
    by_server: bool
    smoothing: float
    learning_rate: float
    lora_B_lr_ratio: float
    values: dict[str, Tensor] = field(default_factory=dict)
    _averages: dict[str, SensitivityAverages] = field(default_factory=dict)
    _round: list[tuple[float, Mapping[str, Scored]]] = field(default_factory=list)
    _rate: float = 1.0  # of the round, over learning_rate

    @property
    def from_gradients(self) -> bool:
        """Whether clients must measure importance while they train."""
        return self.measure in GRADIENT_MEASURES and not self.by_server

    def of(self, adapter: Adapter) -> dict[str, Tensor]:
        """Return a finite score for every component of the global adapter.

        One without a measurement counts as the highest of its module, so that it gets a turn; in a
        module without any, as the highest of the model.
        """
        if self.measure == "magnitude":
            return {name: magnitude_scores(f) for name, f in adapter.modules.items()}
        known = {
            name: self.values.get(name, torch.full((factors.rank,), torch.nan)).double()
            for name, factors in adapter.modules.items()
        }
        of_model = max((_highest(scores, 0.0) for scores in known.values()), default=0.0)
        return {
            name: scores.nan_to_num(nan=_highest(scores, of_model))
            for name, scores in known.items()
        }

    # ---- a round ---------------------------------------------------------------------------

    def begin_round(self) -> None:
        """Forget what the clients of the last round measured."""
        self._round = []

    def add(self, update: ClientUpdate) -> None:
        """Keep the round's learning rate, and what a client measured on what it trained."""
        [self._rate] = update.plan.rates
        read: Callable[[ClientUpdate, str], Scored] | None = None
        if self.measure == "contribution":
            read = _contributions
        elif self.from_gradients:
            read = _uploaded_scores
        if read is not None:
            scores = {name: read(update, name) for name in update.plan.modules}
            self._round.append((float(update.num_examples), scores))

    def end_round(
        self,
        previous: Adapter,
        merged: Mapping[str, LoraFactors],
        trained: Mapping[str, list[int]],
        scaling: float,
        mean: MeanOverClients,
    ) -> None:
        """Update the scores of what was trained.

        Parameters
        ----------
        previous, merged
            The global factors before and after the round, and ``trained``, the components of each
            module that any client trained; read with ``by_server`` only.
        scaling
            PEFT's, to be taken out of ``lora_B``.
        mean
            Mean of the clients' measurements.
        """
        if self.measure == "contribution" or self.from_gradients:
            self._average_clients(previous, mean)
        elif self.measure in GRADIENT_MEASURES:
            self._score_change(previous, merged, trained, scaling)
        self._round = []

    def _average_clients(self, previous: Adapter, mean: MeanOverClients) -> None:
        """Average the clients' scores, then smooth over rounds; unmeasured components stay."""
        decay = 0.0 if self.measure == "sensitivity" else self.smoothing
        weights = torch.tensor([weight for weight, _ in self._round], dtype=torch.float64)
        for name, factors in previous.modules.items():
            rows = torch.full((len(weights), factors.rank), torch.nan, dtype=torch.float64)
            for row, (_, measured) in zip(rows, self._round, strict=True):
                components, scores = measured[name]
                row[list(components)] = scores.double()
            now = mean(rows, weights)
            before = self.values.get(name, torch.full_like(now, torch.nan))
            smoothed = torch.where(before.isfinite(), decay * before + (1 - decay) * now, now)
            self.values[name] = torch.where(now.isfinite(), smoothed, before)

    def _score_change(
        self,
        previous: Adapter,
        merged: Mapping[str, LoraFactors],
        trained: Mapping[str, list[int]],
        scaling: float,
    ) -> None:
        """Score what was trained by the round's change, with the scaling taken out."""
        for name, before in previous.modules.items():
            change = round_sensitivity(
                before.select(trained[name]).scale(1 / scaling),
                merged[name].select(trained[name]).scale(1 / scaling),
                self._rate * self.learning_rate,
                self.lora_B_lr_ratio,
            )
            averages = self._averages.get(name) or SensitivityAverages.zeros(
                before, self.smoothing, self.smoothing
            )
            self._averages[name] = averages = averages.update(change, trained[name])
            kind = cast(ScoreKind, self.measure)
            scores = component_scores(averages, kind, bias_correction=True)
            self.values[name] = scores.where(averages.steps > 0, torch.nan)

    # ---- checkpoints -----------------------------------------------------------------------

    def memory(self) -> dict[str, Any]:
        """Return the scores, and with ``by_server`` the averages that they come from."""
        averages = {name: averages.to_tensors() for name, averages in self._averages.items()}
        return {"scores": dict(self.values), "averages": averages}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Restore scores that `memory` returned."""
        self.values = dict(memory.get("scores", {}))
        self._averages = {
            name: SensitivityAverages.from_tensors(tensors, self.smoothing, self.smoothing)
            for name, tensors in memory.get("averages", {}).items()
        }


def _highest(scores: Tensor, if_none: float) -> float:
    """Return the highest of the scores that were measured; ``if_none`` where none was."""
    measured = scores[scores.isfinite()]
    return measured.max().item() if len(measured) else if_none


def _uploaded_scores(update: ClientUpdate, module: str) -> Scored:
    """Return a client's scores: of the components it trained, or of all it held (probe)."""
    plan = update.plan.modules[module]
    components = plan.held if update.plan.probe_batches else plan.trainable
    return components, update.importance.get(module, torch.zeros(len(components)))


def _contributions(update: ClientUpdate, module: str) -> Scored:
    before, after = update.before.modules[module], update.adapter.modules[module]
    return update.components(module), contribution_scores(before, after)
