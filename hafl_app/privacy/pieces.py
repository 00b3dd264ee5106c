"""Pieces of an upload: rows of lora_A, columns of lora_B and the head, each under a name.

Where clients weigh themselves (`hafl_app.plan_parts.own_weight`) their weights are pieces too. The
clients with one set of components share such a piece: the server learns the sum over each such
group, from which the weight of every component follows, and of no smaller one.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hafl_app.lowrank.factors import Adapter
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.component_lists import format_indices
from hafl_app.privacy.masking import Names, Values

_HEAD = "head/"


@dataclass(frozen=True)
class Shares:
    """What a client counts in a secure sum.

    Parameters
    ----------
    components
        Of each component; with ``own``, of none.
    head
        Of the head.
    own
        Module name to the weight of the client's own rule, where the plan has one.
    """

    components: float
    head: float
    own: Mapping[str, float]

    def by_piece(self, plan: TrainPlan, names: Iterable[str]) -> dict[str, float]:
        """Return the share of each piece: of a weight 1, since it is what it says."""
        shares = {name: self.head if name.startswith(_HEAD) else 1.0 for name in names}
        for module in plan.modules:
            weight = self.own.get(module, self.components)
            shares |= dict.fromkeys(_component_names(plan, module), weight)
        return shares


def piece_names(plan: TrainPlan, head: Iterable[str]) -> Names:
    """Return the names of the pieces that a client uploads under a plan.

    Parameters
    ----------
    head
        Names of the head's tensors that it uploads.
    """
    names = {f"{_HEAD}{name}" for name in head} | set(weight_names(plan).values())
    return frozenset(names.union(*(_component_names(plan, module) for module in plan.modules)))


def weight_names(plan: TrainPlan) -> dict[str, str]:
    """Return the name of the weight of each module; empty unless the client weighs itself.

    With one weight for all modules it is the same for all, and of those with the same components
    in each.
    """
    if plan.own_weight is None:
        return {}
    held = {name: format_indices(module.trainable) for name, module in plan.modules.items()}
    if plan.own_weight.scope == "module":
        return {name: _weight_name(name, components) for name, components in held.items()}
    alike = set(held.values())
    where = alike.pop() if len(alike) == 1 else "; ".join(f"{n}: {c}" for n, c in held.items())
    return dict.fromkeys(held, _weight_name("every module", where))


def _weight_name(module: str, components: str) -> str:
    return f"weight of the clients with components {components or 'none'} in {module}"


def piece_name(factor: str, module: str, component: int) -> str:
    """Return the name of a row of lora_A or a column of lora_B."""
    return f"lora_{factor}/{module}/{component}"


def _component_names(plan: TrainPlan, name: str) -> Iterator[str]:
    module = plan.modules[name]
    for factor in "AB" if module.uploads == "both" else module.uploads:
        for component in module.trainable:
            yield piece_name(factor, name, component)


def pieces_of(adapter: Adapter, plan: TrainPlan) -> dict[str, NDArray[np.float64]]:
    """Return the pieces of what a client uploads, or of its change; without weights.

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
        yield f"{_HEAD}{name}", tensor
