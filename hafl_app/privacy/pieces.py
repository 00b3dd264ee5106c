"""Pieces of an upload: rows of lora_A, columns of lora_B and the head, each under a name."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hafl_app.lowrank.factors import Adapter
from hafl_app.plan import TrainPlan
from hafl_app.privacy.masking import Names, Values


def piece_names(plan: TrainPlan, head: Iterable[str]) -> Names:
    """Return the names of the pieces that a client uploads under a plan.

    Parameters
    ----------
    head
        Names of the head's tensors that it uploads.
    """
    names = {f"head/{name}" for name in head}
    for name, module in plan.modules.items():
        for factor in "AB" if module.uploads == "both" else module.uploads:
            names.update(piece_name(factor, name, component) for component in module.trainable)
    return frozenset(names)


def piece_name(factor: str, module: str, component: int) -> str:
    """Return the name of a row of lora_A or a column of lora_B."""
    return f"lora_{factor}/{module}/{component}"


def pieces_of(adapter: Adapter, plan: TrainPlan) -> dict[str, NDArray[np.float64]]:
    """Return the pieces of what a client uploads, or of its change.

    Parameters
    ----------
    adapter
        The trained factors of the trainable components, in the plan's order, and the head if it
        travels, see `hafl_app.privacy.mechanism.trained_part`.
    """
    return {name: tensor.double().numpy(force=True).ravel() for name, tensor in _cut(adapter, plan)}


def with_pieces(like: Adapter, plan: TrainPlan, pieces: Values) -> Adapter:
    """Return the adapter whose pieces these are, in float64; ``like`` has its shapes."""
    made = {name: torch.empty_like(t, dtype=torch.float64) for name, t in like.tensors().items()}
    adapter = Adapter.from_tensors(made)
    for name, tensor in _cut(adapter, plan):
        tensor.copy_(torch.from_numpy(pieces[name]).view(tensor.shape))
    return adapter


def _cut(adapter: Adapter, plan: TrainPlan) -> Iterator[tuple[str, Tensor]]:
    """Yield the pieces by name, as views."""
    for name, factors in adapter.modules.items():
        module = plan.modules[name]
        for slot, component in enumerate(module.trainable[: factors.rank]):
            if module.uploads != "B":
                yield piece_name("A", name, component), factors.lora_A[slot]
            if module.uploads != "A":
                yield piece_name("B", name, component), factors.lora_B[:, slot]
    for name, tensor in adapter.head.items():
        yield f"head/{name}", tensor
