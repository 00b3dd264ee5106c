"""PEFT's format of an adapter, written so that others compute the same update from it.

PEFT scales a module's update by its own alpha over its own rank, which ``rank_pattern`` and
``alpha_pattern`` give. vLLM reads neither pattern: it scales every module by ``lora_alpha / r`` of
the config (its ``PEFTHelper``). llama.cpp reads ``lora_alpha`` alone and divides it by the rank of
each tensor (``convert_lora_to_gguf.py``, and ``get_scale`` in ``llama-adapter.h``): a module of
rank 2 beside an alpha of 8 would be four times too strong.

Therefore every module is padded with zero components to the largest rank, which is ``r`` and
``lora_alpha`` too: the scaling is 1 by all three rules, ``lora_B`` is stored as the federation has
it, and there are no patterns.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from peft import LoraConfig
from torch import Tensor

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.training.base_model import CAUSAL_LM, IMAGE_CLASSIFICATION
from hafl_app.training.settings import BaseSpec

WEIGHTS_FILE: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
CLS_HEAD: Final = "classifier"
"""What models with a classification head call it."""
_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"


def peft_config(
    adapter: Adapter, base: BaseSpec, modules_to_save: Sequence[str] | None
) -> LoraConfig:
    """Return the config that belongs to `factor_tensors`."""
    rank = largest_rank(adapter)
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(adapter.modules),
        # PEFT has no name for what an image classifier does, and wraps it right without one.
        task_type=None if base.task == IMAGE_CLASSIFICATION else task_type(base),
        modules_to_save=list(modules_to_save) if modules_to_save else None,
        base_model_name_or_path=base.path,
        revision=base.revision,
        inference_mode=True,
    )


def factor_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return the factors by PEFT's keys, every module padded to the largest rank."""
    rank = largest_rank(adapter)
    tensors = {}
    for name, factors in adapter.modules.items():
        key_A, key_B = factor_keys(name)
        # Not copied for nothing: a large adapter is a gigabyte.
        padded = factors if factors.rank == rank else factors.padded(rank)
        tensors[key_A], tensors[key_B] = padded.lora_A, padded.lora_B
    return tensors


def without_padding(factors: LoraFactors, rank: int | None) -> LoraFactors:
    """Return the first ``rank`` components, if the others are the zeros of `factor_tensors`.

    Others are kept: someone may have trained on from the file. `None` keeps all.
    """
    if rank is None or not 0 < rank < factors.rank:
        return factors
    padding = factors.select(range(rank, factors.rank))
    if padding.lora_A.any() or padding.lora_B.any():
        return factors
    return factors.select(range(rank))


def factor_keys(module: str) -> tuple[str, str]:
    """Return PEFT's keys of a module's ``lora_A`` and ``lora_B``."""
    return f"{PREFIX}{module}{_LORA_A}", f"{PREFIX}{module}{_LORA_B}"


def tensor_keys(modules: Iterable[str]) -> set[str]:
    """Return PEFT's keys of the factors of modules."""
    return {key for module in modules for key in factor_keys(module)}


def module_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the modules that have a ``lora_A`` among tensors by PEFT's keys."""
    return [
        key.removeprefix(PREFIX).removesuffix(_LORA_A) for key in tensors if key.endswith(_LORA_A)
    ]


def task_type(base: BaseSpec) -> str:
    """Return PEFT's name of what a model does: ``FEATURE_EXTRACTION`` is mean pooling.

    ``SEQ_CLS`` is a classification head of the model's own, also that of an image classifier.
    """
    if base.task == CAUSAL_LM:
        return "CAUSAL_LM"
    return "SEQ_CLS" if base.pooling == "cls" else "FEATURE_EXTRACTION"


def largest_rank(adapter: Adapter) -> int:
    """Return the rank that every module of an adapter is written with."""
    return max(factors.rank for factors in adapter.modules.values())
