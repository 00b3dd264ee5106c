"""The largest numbers of an adapter's factors, all others 0."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hafl_app.lowrank.factors import LoraFactors


def largest_entries(
    modules: Mapping[str, LoraFactors], kept: int, scaling: Mapping[str, float]
) -> dict[str, LoraFactors]:
    """Return the factors with all but the ``kept`` largest of their numbers set to 0.

    The numbers of all modules and both factors are compared with each other, by magnitude. Among
    equal ones the first are kept: modules by name, lora_A before lora_B.

    Parameters
    ----------
    kept
        At least 0, over all modules.
    scaling
        Module name to PEFT's scaling, which is taken out of lora_B for the comparison.

    Notes
    -----
    Kuo et al., "Federated LoRA with Sparse Communication" (FLASC), arXiv:2406.05233: a mask over
    all adapter weights, laid end to end.
    """
    names = sorted(modules)
    sizes = [
        part.detach().abs().flatten().cpu()
        for name in names
        for part in (modules[name].lora_A, modules[name].lora_B / scaling[name])
    ]
    joined = torch.cat(sizes) if sizes else torch.zeros(0)
    mask = torch.zeros(len(joined), dtype=torch.bool)
    mask[joined.argsort(descending=True, stable=True)[:kept]] = True
    parts = iter(torch.split(mask, [len(size) for size in sizes]))
    return {name: _masked(modules[name], next(parts), next(parts)) for name in names}


def _masked(factors: LoraFactors, of_A: Tensor, of_B: Tensor) -> LoraFactors:
    keeps_A = of_A.reshape(factors.lora_A.shape).to(factors.lora_A.device)
    keeps_B = of_B.reshape(factors.lora_B.shape).to(factors.lora_B.device)
    return LoraFactors(factors.lora_A.where(keeps_A, 0.0), factors.lora_B.where(keeps_B, 0.0))
