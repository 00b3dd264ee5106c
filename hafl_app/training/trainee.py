"""Trainee: where one client's factors and head are trained."""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hafl_app.lowrank.factors import Adapter
from hafl_app.plan import TrainPlan
from hafl_app.training.batches import Examples


class Trainee(Protocol):
    """One client's factors and head where a model holds them: a model, or one of a cohort."""

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""

    @property
    def head_module(self) -> nn.Module:
        """The head; a module without parameters if there is none."""

    def trainable_factors(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """See `hafl_app.training.lora_model.LoraModel.trainable_factors`."""

    def trainable_scales(self) -> list[nn.Parameter]:
        """See `hafl_app.training.lora_model.LoraModel.trainable_scales`."""

    def trained(self, plan: TrainPlan) -> Adapter:
        """See `hafl_app.training.lora_model.LoraModel.trained`."""

    def num_targets(self, examples: Examples, rows: NDArray[np.int64]) -> int:
        """See `hafl_app.training.lora_model.LoraModel.num_targets`."""

    def train(self) -> object:
        """Enter training mode."""
