"""A frozen base model in bfloat16: its weights rounded once, attention computed in float32.

``torch.autocast`` alone rounds every weight anew in every step, and keeps the hidden states in
float32, since the embeddings are. With rounded weights they are bfloat16 throughout. LoRA factors
and head stay in float32, and so do the optimizer's moments and the importance averages.
"""

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hafl_app.training.quantization.linear import QuantizedLinear

_STOCK: Final = "sdpa"
_IN_FLOAT32: Final = "sdpa_in_float32_on_the_cpu"


def round_weights(base: PreTrainedModel, head: nn.Module) -> None:
    """Round the frozen weights of a base model with LoRA layers to bfloat16, in place.

    Parameters
    ----------
    head
        What is trained beside the factors; it stays as it is, also where it is a part of ``base``.
    """
    for _, parameter in _roundable(base, head):
        parameter.data = parameter.data.to(torch.bfloat16)
    _swap_attention(base, _STOCK, _IN_FLOAT32)


def restore_weights(base: PreTrainedModel, head: nn.Module, whole: PreTrainedModel) -> None:
    """Undo `round_weights` with the weights of ``whole``: the same base model, loaded anew."""
    original = dict(whole.named_parameters())
    for name, parameter in _roundable(base, head):
        # PEFT moves what it adapts one level down.
        source = original[name.replace(".base_layer.", ".")]
        parameter.data = source.data.to(parameter.device)
    _swap_attention(base, _IN_FLOAT32, _STOCK)


def _roundable(base: nn.Module, head: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the weights that `round_weights` is about; quantized ones are packed otherwise."""
    kept = {id(parameter) for parameter in head.parameters()}
    for module in base.modules():
        if isinstance(module, QuantizedLinear):
            kept |= {id(module.weight), id(module.scales)}
    for name, parameter in base.named_parameters():
        is_wide = parameter.dtype in (torch.float32, torch.bfloat16)
        if is_wide and ".lora_" not in name and id(parameter) not in kept:
            yield name, parameter


def _swap_attention(base: Any, before: str, after: str) -> None:
    config = base.config
    if (
        getattr(config, "_attn_implementation", None) == before
        and base._can_set_attn_implementation()
    ):
        base.set_attn_implementation(after)


def _attention_in_float32(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute Transformers' fused attention; on the CPU in float32, whatever its inputs are.

    The backward pass of PyTorch's kernel for the CPU takes nine times as long in bfloat16 at 16
    tokens, more than all products of a step together; at 256 both take the same.
    """
    if query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        output, _ = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **options
        )
    return output.to(query.dtype), None


AttentionInterface.register(_IN_FLOAT32, _attention_in_float32)
AttentionMaskInterface.register(_IN_FLOAT32, sdpa_mask)
