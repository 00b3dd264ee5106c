"""HetLoRA's self-pruning on the client: the tail's norm, its penalty, and what pruning leaves.

The equations and their source are in `hafl_app/strategies/hetlora.py`. Where one factor alone is
trained, the norm of the other one's tail is a constant: the penalty acts on the trained factor, and
a tail is dropped if that factor's has shrunk.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hafl_app.lowrank.factors import Adapter
from hafl_app.plan_parts.tail_pruning import TailPruning
from hafl_app.training.trainee import Trainee


def tail_norms(model: Trainee, tail: TailPruning | None) -> dict[str, float]:
    """Return ``||B_tail||_F * ||A_tail||_F`` by module."""
    if tail is None:
        return {}
    with torch.no_grad():
        return {
            name: float(_tail_product(a, b, tail.start(a.shape[0])))
            for name, (a, b) in model.trainable_factors().items()
        }


def tail_penalty(model: Trainee, tail: TailPruning) -> Tensor:
    """Return ``lambda sum ||B_tail||_F ||A_tail||_F`` over the modules, with its graph."""
    pairs = model.trainable_factors().values()
    products = [_tail_product(a, b, tail.start(a.shape[0])) for a, b in pairs]
    return tail.weight * sum(products, torch.zeros((), device=model.device))


def _tail_product(lora_A: Tensor, lora_B: Tensor, start: int) -> Tensor:
    # The norm's gradient at B = 0 is NaN without a floor; every LoRA starts there.
    tail_A, tail_B = lora_A[start:], lora_B[:, start:]
    return (tail_A.square().sum() * tail_B.square().sum() + 1e-12).sqrt()


def prune_tail(
    trained: Adapter, tail: TailPruning, before: Mapping[str, float], after: Mapping[str, float]
) -> Adapter:
    """Return the adapter without those tails whose norm, by module, training has lowered."""
    return Adapter(
        {
            name: factors.select(range(tail.start(factors.rank)))
            if name in before and after[name] < before[name]
            else factors
            for name, factors in trained.modules.items()
        },
        trained.head,
    )
