"""A base model with its transformer blocks quantized, all alike or each in a precision of its own.

Quantized are the linear layers of the blocks. Embeddings, norms, biases and whatever makes the
output stay in float32.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hafl_app.training.quantization.linear import QuantizedLinear, packed_bytes
from hafl_app.training.quantization.precisions import PRECISIONS, QuantizationError


def transformer_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a Transformers model's blocks by name, first block first.

    Raises
    ------
    QuantizationError
        If there is no list of as many blocks as in its configuration.
    """
    number = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return [(f"{name}.{index}", block) for index, block in enumerate(module)]
    raise QuantizationError(
        f"model.quantization: {type(model).__name__} has no list of {number} transformer blocks"
    )


def precisions_of(quantization: str, blocks: int) -> tuple[str, ...]:
    """Return the precision of every block.

    Parameters
    ----------
    quantization
        One of `PRECISIONS` for all blocks, or one for each, joined by commas.

    Raises
    ------
    QuantizationError
        If one is unknown, or their number is neither 1 nor ``blocks``.
    """
    chosen = tuple(quantization.split(","))
    if unknown := [name for name in chosen if name not in PRECISIONS]:
        raise QuantizationError(
            f"model.quantization={unknown[0]}: expected one of none, {', '.join(PRECISIONS)}"
        )
    if len(chosen) not in {1, blocks}:
        raise QuantizationError(
            f"model.quantization: {len(chosen)} precisions for {blocks} transformer blocks"
        )
    return chosen if len(chosen) == blocks else chosen * blocks


def quantize(model: nn.Module, quantization: str) -> None:
    """Replace the linear layers of the transformer blocks by quantized ones, in place.

    One layer after another is packed and its weight let go. On the meta device, where there are
    only shapes, the new layers wait for their weights.

    Parameters
    ----------
    quantization
        See `precisions_of`.

    Raises
    ------
    QuantizationError
        See `precisions_of` and `transformer_blocks`, or if a library is missing.
    """
    names = [[name for name, _ in layers] for layers in block_linears(model)]
    precisions = precisions_of(quantization, len(names))
    for precision, layers in zip(precisions, names, strict=True):
        for name in layers:
            model.set_submodule(name, _quantized(model.get_submodule(name), precision))


def _quantized(plain: Any, precision: str) -> QuantizedLinear:
    has_bias = plain.bias is not None
    layer = QuantizedLinear(plain.in_features, plain.out_features, precision, bias=has_bias)
    if not plain.weight.is_meta:
        layer.pack(plain.weight)
        layer.bias = plain.bias
        layer.requires_grad_(False)
    return layer


def dequantize(model: nn.Module) -> None:
    """Replace quantized layers by plain ones with the rounded weights in float32, in place."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    for name, layer in layers:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.dense(torch.float32), requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(name, plain)


def block_bytes(model: nn.Module) -> list[dict[str, int]]:
    """Return the bytes of every block's packed weights, by precision; shapes suffice for it."""
    return [
        {
            precision: sum(
                packed_bytes(layer.out_features, layer.in_features, precision)
                for _, layer in layers
            )
            for precision in PRECISIONS
        }
        for layers in block_linears(model)
    ]


def block_linears(model: nn.Module) -> Iterator[list[tuple[str, nn.Linear]]]:
    """Yield the linear layers of every block, by their names in the model."""
    for block_name, block in transformer_blocks(model):
        yield [
            (f"{block_name}.{name}", layer)
            for name, layer in block.named_modules()
            if isinstance(layer, nn.Linear)
        ]
