"""The lora_B of a plan's `hafl_app.plan_parts.trained_core.Core` in a PEFT layer."""

import torch
from torch import Tensor, nn

from hafl_app.lowrank.cores import spread


class CoreLinear(nn.Module):
    """A linear layer whose weight is a frozen basis times trained cores, block by block.

    Parameters
    ----------
    basis
        Shape ``(out_features, rank)``; it gets no gradient.
    cores
        Shape ``(size, rank)``, side by side the cores of the blocks.
    scaled
        Whether each core has a trained factor, 1 at the start.

    Attributes
    ----------
    core
        The cores, without those factors.
    scales
        The factors, shape ``(blocks,)``; not a parameter unless ``scaled``.
    """

    def __init__(self, basis: Tensor, cores: Tensor, *, scaled: bool) -> None:
        super().__init__()
        self.register_buffer("basis", basis, persistent=False)
        self.core = nn.Parameter(cores)
        self.scales: Tensor
        ones = cores.new_ones(cores.shape[1] // cores.shape[0])
        if scaled:
            self.scales = nn.Parameter(ones)
        else:
            self.register_buffer("scales", ones, persistent=False)

    def cores(self) -> Tensor:
        """Return the cores times their factors, shape ``(size, rank)``."""
        return self.core * self.scales.repeat_interleave(self.core.shape[0])

    @property
    def weight(self) -> Tensor:
        """The lora_B that the cores make of the basis, with its graph."""
        basis: Tensor = self.get_buffer("basis")
        return spread(basis, self.cores())

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x weight^T``."""
        return torch.nn.functional.linear(x, self.weight)
