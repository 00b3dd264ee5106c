"""Importance of the components a client trains, measured from its gradients."""

import torch
from torch import Tensor

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.importance import SensitivityAverages, component_scores, sensitivity
from hafl_app.plan import ImportanceMeasure
from hafl_app.training.lora_model import LoraModel


class ImportanceMeter:
    """Running sensitivities of the trainable components over local steps.

    Parameters
    ----------
    measure
        ``none``, ``sensitivity``, ``smoothed`` or ``adalora``, see
        `hafl_app.lowrank.importance.component_scores`.
    smoothing
        Decay of the moving averages, in [0, 1).
    """

    def __init__(self, measure: ImportanceMeasure, smoothing: float) -> None:
        self._measure = measure
        self._smoothing = smoothing
        self._averages: dict[str, SensitivityAverages] = {}

    @torch.no_grad()
    def update(self, model: LoraModel) -> None:
        """Take in the gradients of one step; to be called before they are clipped."""
        if self._measure == "none":
            return
        for name, (lora_A, lora_B) in model.trainable_factors().items():
            if lora_A.grad is None or lora_B.grad is None:
                continue
            factors = LoraFactors(lora_A.detach(), lora_B.detach())
            step = sensitivity(factors, LoraFactors(lora_A.grad, lora_B.grad))
            before = self._averages.get(name) or SensitivityAverages.zeros(
                factors, self._smoothing, self._smoothing
            )
            self._averages[name] = before.update(step)

    def scores(self) -> dict[str, Tensor]:
        """Return module name to scores of shape ``(trainable components,)``, float32."""
        if self._measure == "none":
            return {}
        # Clients take different numbers of steps: without the correction more steps score higher.
        return {
            name: component_scores(averages, self._measure, bias_correction=True).float().cpu()
            for name, averages in self._averages.items()
        }
