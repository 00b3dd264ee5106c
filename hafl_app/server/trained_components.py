"""Components that a round trained, factor by factor: what a server optimizer may step on."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hafl_app.lowrank.factors import Adapter
from hafl_app.server.update import ClientUpdate


class TrainedComponents:
    """Components of the global adapter that a round trained, noted while its updates are folded.

    Parameters
    ----------
    adapter
        The global adapter before the round.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._ranks = {name: factors.rank for name, factors in adapter.modules.items()}
        self._trained: dict[str, tuple[set[int], set[int]]] = {
            name: (set(), set()) for name in self._ranks
        }

    def note(self, update: ClientUpdate) -> None:
        """Record what a client trained and uploaded."""
        for name, (of_A, of_B) in self._trained.items():
            uploads, components = update.plan.modules[name].uploads, update.components(name)
            if uploads != "B":
                of_A.update(components)
            if uploads != "A":
                of_B.update(components)

    def note_counts(self, counts: Mapping[str, Tensor]) -> None:
        """Record what any node's plan trains: see `central_privacy.trainable_counts`."""
        for name, count in counts.items():
            for trained, counts_of_factor in zip(self._trained[name], count, strict=True):
                trained.update(counts_of_factor.nonzero().flatten().tolist())

    def masks(self) -> dict[str, Tensor]:
        """Return which rows of lora_A and which columns of lora_B were trained.

        Returns
        -------
        dict
            By the names of `Adapter.tensors`: of shape ``(rank, 1)`` for lora_A and ``(1, rank)``
            for lora_B, bool.
        """
        masks = {}
        for name, trained in self._trained.items():
            of_A, of_B = torch.zeros(2, self._ranks[name], dtype=torch.bool)
            of_A[list(trained[0])] = True
            of_B[list(trained[1])] = True
            masks[f"lora_A/{name}"], masks[f"lora_B/{name}"] = of_A[:, None], of_B[None]
        return masks
