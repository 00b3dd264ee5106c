"""Factors in PEFT's layers: put there for a plan, frozen where it does not train, and read back.

Every adapted layer carries two adapters: components that are trained, and those that only stay in
the forward pass.
"""

import warnings
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.training.core_linear import CoreLinear

TRAINABLE, FROZEN = "trainable_components", "frozen_components"


class AdapterFitError(ValueError):
    """An adapter or a plan for other layers than the model's."""


def inject(model: nn.Module, targets: list[str], name: str, dropout: float) -> None:
    """Give every target layer an adapter of that name, whose factors a plan fills later."""
    # Rank and scaling are only places to put a plan's factors into, see `_put`.
    config = LoraConfig(r=1, lora_alpha=1, target_modules=targets, lora_dropout=dropout)
    with warnings.catch_warnings():
        # PEFT doubts that a model is meant to have two adapters; this one is.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, model, adapter_name=name)


def factors_of(layer: LoraLayer, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return ``(lora_A, lora_B)`` of one of a layer's adapters; of a core the cores as lora_B."""
    lora_A, lora_B = cast(Any, layer.lora_A[name]), cast(Any, layer.lora_B[name])
    return lora_A.weight, lora_B.core if isinstance(lora_B, CoreLinear) else lora_B.weight


def trained_factors(layer: LoraLayer) -> LoraFactors:
    """Return a layer's trainable factors as they are; of a core the cores times their factors."""
    lora_A, lora_B = (parameter.detach() for parameter in factors_of(layer, TRAINABLE))
    linear_B = layer.lora_B[TRAINABLE]
    if isinstance(linear_B, CoreLinear):
        lora_B = linear_B.cores().detach()
    return LoraFactors(lora_A, lora_B)


def put_components(
    layer: LoraLayer,
    factors: LoraFactors,
    module: ModulePlan,
    device: torch.device,
    dtype: torch.dtype,
) -> list[str]:
    """Put the held components into a layer, trainable and frozen ones apart.

    Parameters
    ----------
    factors
        Of the held components; for cores their products with the bases.

    Returns
    -------
    list
        The layer's adapters that have components now, to be its active ones.
    """
    active = []
    for name, slots in ((TRAINABLE, module.trainable_slots), (FROZEN, module.frozen_slots)):
        part = factors.select(slots)
        _put(layer, name, part, module.scaling, device, dtype)
        layer.scaling[name] *= module.gain
        if part.rank:
            active.append(name)
    return active


def _put(
    layer: LoraLayer,
    name: str,
    factors: LoraFactors,
    scaling: float,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    if isinstance(layer.lora_B[name], CoreLinear):  # of the client before
        layer.lora_B[name] = nn.Linear(1, int(layer.out_features or 0), bias=False)
    linear_A: Any = layer.lora_A[name]
    linear_B: Any = layer.lora_B[name]
    # Parameters keep no link to the message's buffers, and may change rank from client to client.
    linear_A.weight = nn.Parameter(factors.lora_A.to(device, dtype, copy=True))
    linear_B.weight = nn.Parameter((factors.lora_B / scaling).to(device, dtype, copy=True))
    linear_A.out_features = linear_B.in_features = layer.r[name] = factors.rank
    layer.scaling[name] = scaling


def put_core(layer: LoraLayer, cores: LoraFactors, bases: LoraFactors, module: ModulePlan) -> None:
    """Put trained cores in the place of the trainable lora_B, which is their product so far.

    Parameters
    ----------
    cores, bases
        Of the trainable components, as they travel and as they are drawn.
    """
    like, _ = factors_of(layer, TRAINABLE)
    basis = bases.lora_B.to(like.device, like.dtype, copy=True)
    core = (cores.lora_B / module.scaling).to(like.device, like.dtype, copy=True)
    scaled = module.core is not None and module.core.scaled
    layer.lora_B[TRAINABLE] = CoreLinear(basis, core, scaled=scaled)


def freeze_untrained(layer: LoraLayer, module: ModulePlan) -> None:
    """Leave gradients to what the plan trains of a layer, and to nothing else."""
    # PEFT makes every active adapter trainable, and both its factors.
    for parameter in factors_of(layer, FROZEN):
        parameter.requires_grad_(False)
    lora_A, lora_B = factors_of(layer, TRAINABLE)
    if not module.trains_A:
        lora_A.requires_grad_(False)
    if not module.trains_B:
        lora_B.requires_grad_(False)


def check_fit(name: str, layer: LoraLayer, factors: LoraFactors, module: ModulePlan) -> None:
    """Refuse factors that are not the held components of a layer.

    Raises
    ------
    AdapterFitError
        Naming the module, what it has and what was expected.
    """
    expected = layer.out_features, layer.in_features
    if module.core is not None:
        expected = module.core.size, 0
    if (factors.out_features, factors.in_features) != expected:
        raise AdapterFitError(
            f"module {name!r}: factors of a ({factors.out_features}, {factors.in_features}) weight "
            f"for a layer of ({expected[0]}, {expected[1]})"
        )
    if factors.rank != len(module.held):
        raise AdapterFitError(
            f"module {name!r}: rank {factors.rank}, the plan holds {len(module.held)} components"
        )
