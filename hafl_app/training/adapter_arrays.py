"""Adapters as plain arrays, as the wire carries them, and back."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hafl_app.lowrank.factors import Adapter, LoraFactors

# PyTorch knows no tensors that cannot be written to, and warns of it once in every process.
warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)

Array = NDArray[np.float32]


def to_arrays(adapter: Adapter) -> tuple[dict[str, tuple[Array, Array]], dict[str, Array]]:
    """Return ``(lora_A, lora_B)`` by module and the head's arrays by name."""
    modules = {
        name: (_array(factors.lora_A), _array(factors.lora_B))
        for name, factors in adapter.modules.items()
    }
    return modules, {name: _array(tensor) for name, tensor in adapter.head.items()}


def from_arrays(modules: Mapping[str, tuple[Array, Array]], head: Mapping[str, Array]) -> Adapter:
    """Return the adapter whose tensors are these arrays; they share memory.

    That of a message, as a rule, which must stay as it is: these tensors must not be written to.

    Raises
    ------
    ValueError
        If the factors of a module disagree on the rank.
    """
    return Adapter(
        {
            name: LoraFactors(torch.from_numpy(lora_A), torch.from_numpy(lora_B))
            for name, (lora_A, lora_B) in modules.items()
        },
        {name: torch.from_numpy(array) for name, array in head.items()},
    )


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    return np.ascontiguousarray(tensor.float().numpy(force=True))  # bfloat16 is no NumPy type
