"""Adapters of a smaller rank: each module's best approximation, and its loss."""

from collections.abc import Mapping
from dataclasses import dataclass

from hafl_app.lowrank.factors import Adapter
from hafl_app.lowrank.svd import tail_energy, truncated_adapter


@dataclass(frozen=True)
class Truncation:
    """An adapter cut to a rank.

    Parameters
    ----------
    rank
        The rank that was asked for; a module with fewer components keeps them all.
    adapter
        The cut adapter. The head is the whole one's.
    lost_by_module
        Share of each module's squared norm that is lost, in [0, 1].
    lost
        Share of the squared norm of all modules together that is lost, in [0, 1].
    """

    rank: int
    adapter: Adapter
    lost_by_module: Mapping[str, float]
    lost: float


def truncate_adapter(adapter: Adapter, rank: int) -> Truncation:
    """Cut every module to its best approximation of a rank (Eckart, Young 1936).

    Parameters
    ----------
    adapter
        PEFT's scaling is already inside ``lora_B``, so that the cut sees what the layer sees.
    rank
        From 1 to the largest rank of a module.

    Raises
    ------
    ValueError
        If ``rank`` is outside of that range.
    """
    largest = max((factors.rank for factors in adapter.modules.values()), default=0)
    if not 1 <= rank <= largest:
        raise ValueError(f"rank {rank}: expected 1 to {largest}, the rank of the adapter")
    cut = truncated_adapter(adapter, lambda name: min(rank, adapter.modules[name].rank))
    shares = {name: float(tail_energy(f, rank)) for name, f in adapter.modules.items()}
    energies = {name: float(f.squared_norm()) for name, f in adapter.modules.items()}
    lost = sum(shares[name] * energies[name] for name in shares)
    total = sum(energies.values())
    return Truncation(rank, cut, shares, lost / total if total else 0.0)
