"""Importance of the components a client trains, measured from its gradients."""

import torch
from torch import Tensor

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.importance import SensitivityAverages, component_scores, sensitivity
from hafl_app.plan import ImportanceMeasure
from hafl_app.training.trainee import Trainee


class ImportanceMeter:
    """Running sensitivities of the trainable components over local steps.

    Of the trained factors: one that is not trained has no gradient, and adds nothing to a score.

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
    def update(self, model: Trainee) -> None:
        """Add the gradients of one step; to be called before they are clipped."""
        if self._measure == "none":
            return
        for name, (lora_A, lora_B) in model.trainable_factors().items():
            grad_A = lora_A.grad if lora_A.requires_grad else lora_A[:, :0]
            grad_B = lora_B.grad if lora_B.requires_grad else lora_B[:0]
            if grad_A is None or grad_B is None:
                continue
            gradients = LoraFactors(grad_A, grad_B)
            # As wide as the gradients: a factor that has none has no features here.
            factors = LoraFactors(
                lora_A.detach()[:, : gradients.in_features],
                lora_B.detach()[: gradients.out_features],
            )
            step = sensitivity(factors, gradients)
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
