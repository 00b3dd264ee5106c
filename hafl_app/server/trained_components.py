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
        self._trained = {
            name: torch.zeros(2, factors.rank, dtype=torch.bool)
            for name, factors in adapter.modules.items()
        }

    def note(self, update: ClientUpdate) -> None:
        """Record what a client trained and uploaded."""
        for name, trained in self._trained.items():
            module = update.plan.modules[name]
            factors = torch.tensor([module.uploads != "B", module.uploads != "A"])
            trained[:, list(update.components(name))] |= factors[:, None]

    def note_counts(self, counts: Mapping[str, Tensor]) -> None:
        """Record what any node's plan trains: see `central_privacy.trainable_counts`."""
        for name, count in counts.items():
            self._trained[name] |= count > 0

    def masks(self) -> dict[str, Tensor]:
        """Return which rows of lora_A and which columns of lora_B were trained.

        Returns
        -------
        dict
            By the names of `Adapter.tensors`: of shape ``(rank, 1)`` for lora_A and ``(1, rank)``
            for lora_B, bool.
        """
        masks = {}
        for name, (trains_A, trains_B) in self._trained.items():
            masks[f"lora_A/{name}"], masks[f"lora_B/{name}"] = trains_A[:, None], trains_B[None]
        return masks
