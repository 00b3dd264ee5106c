"""The clients' influence on a step: CPU seconds, bytes kept of a client, error of projections."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from hafl_app.lowrank.factors import Adapter, LoraFactors, ModuleShape, initial_adapter
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.server.influence import Influence, InfluenceMeter
from hafl_app.server.update import ClientUpdate

# MiniLM's linear layers in one block of the encoder.
_BLOCK = {
    **dict.fromkeys(("query", "key", "value", "attention"), (384, 384)),
    "intermediate": (1536, 384),
    "output": (384, 1536),
}
_HEAVY_TAIL = {2: 16, 4: 8, 8: 4, 16: 2}  # clients of each rank, of 30


@dataclass(frozen=True)
class Round:
    """A round of clients of mixed rank, whose changes have a direction in common.

    Parameters
    ----------
    num_clients
        Of LoRA-A2's heavy tail of ranks 2 to 16.
    num_layers
        Blocks of MiniLM's widths, six adapted layers each.
    """

    num_clients: int
    num_layers: int

    @property
    def ranks(self) -> list[int]:
        """Rank of each client."""
        tail = [rank for rank, count in _HEAVY_TAIL.items() for _ in range(count)]
        return sorted(tail[k % len(tail)] for k in range(self.num_clients))

    @cached_property
    def updates(self) -> list[ClientUpdate]:
        """The clients' updates: each holds all components, and has trained the first of them."""
        rank, generator = max(_HEAVY_TAIL), torch.Generator().manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        shapes = {
            f"layer.{i}.{name}": ModuleShape(*shape)
            for i in range(self.num_layers)
            for name, shape in _BLOCK.items()
        }
        start = initial_adapter(shapes, rank, seed=0)
        start = start.map(lambda f: LoraFactors(f.lora_A, 0.02 * randn(*f.lora_B.shape)))
        shared = start.map(lambda f: LoraFactors(randn(*f.lora_A.shape), randn(*f.lora_B.shape)))
        updates = []
        for k, own in enumerate(self.ranks):
            trained = {}
            for name, factors in start.modules.items():
                before, common = factors.select(range(own)), shared.modules[name]
                row = randn(own, factors.in_features) + 0.5 * common.lora_A[:own]
                column = randn(factors.out_features, own) + 0.5 * common.lora_B[:, :own]
                trained[name] = LoraFactors(
                    before.lora_A + 0.01 * row, before.lora_B + 0.01 * column
                )
            module = ModulePlan(tuple(range(rank)), tuple(range(own)))
            plan = TrainPlan(dict.fromkeys(shapes, module))
            updates.append(ClientUpdate(k, 10 + 7 * k % 50, plan, start, Adapter(trained)))
        return updates

    def influences(self, *, projects: bool) -> Sequence[Influence]:
        """Return the clients' influence under adaptive aggregation."""
        return self._meter(projects=projects).result()

    def _meter(self, *, projects: bool) -> InfluenceMeter:
        meter = InfluenceMeter(0.0, projects=projects)
        for update in self.updates:
            meter.note(update, float(update.num_examples))
        return meter

    def kept_bytes(self) -> tuple[float, float]:
        """Return the mean bytes that are kept of a client with projections, and of its update."""
        kept = [
            _bytes(client.change(name))
            for client in self._meter(projects=True)._clients
            for name in client.components
        ]
        uploads = [_bytes(f) for update in self.updates for f in update.adapter.modules.values()]
        return sum(kept) / self.num_clients, sum(uploads) / self.num_clients


def _bytes(factors: LoraFactors) -> int:
    return factors.lora_A.nbytes + factors.lora_B.nbytes
