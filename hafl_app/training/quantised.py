"""A base model with its transformer blocks quantised, all alike or each in a precision of its own.

Quantised are the linear layers of the blocks. Embeddings, norms, biases and whatever makes the
output stay in float32.
"""

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn

from hafl_app.training.quantised_linear import (
    PRECISIONS,
    QuantisationError,
    QuantisedLinear,
    packed_bytes,
)

NOT_QUANTISED: Final = "none"


def transformer_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a Transformers model's blocks by name, first block first.

    Raises
    ------
    QuantisationError
        If there is no list of as many blocks as its configuration says.
    """
    number = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return [(f"{name}.{index}", block) for index, block in enumerate(module)]
    raise QuantisationError(
        f"model.quantisation: {type(model).__name__} has no list of {number} transformer blocks"
    )


def precisions_of(quantisation: str, blocks: int) -> tuple[str, ...]:
    """Return the precision of every block.

    Parameters
    ----------
    quantisation
        One of `PRECISIONS` for all blocks, or one for each, joined by commas.

    Raises
    ------
    QuantisationError
        If one is unknown, or their number is neither 1 nor ``blocks``.
    """
    chosen = tuple(quantisation.split(","))
    if unknown := [name for name in chosen if name not in PRECISIONS]:
        raise QuantisationError(
            f"model.quantisation={unknown[0]}: expected one of none, {', '.join(PRECISIONS)}"
        )
    if len(chosen) not in {1, blocks}:
        raise QuantisationError(
            f"model.quantisation: {len(chosen)} precisions for {blocks} transformer blocks"
        )
    return chosen if len(chosen) == blocks else chosen * blocks


def quantise(model: nn.Module, quantisation: str) -> None:
    """Replace the linear layers of the transformer blocks by quantised ones, in place.

    One layer after another is packed and its weight let go. On the meta device, where there are
    only shapes, the new layers wait for their weights.

    Parameters
    ----------
    quantisation
        See `precisions_of`.

    Raises
    ------
    QuantisationError
        See `precisions_of` and `transformer_blocks`, or if a library is missing.
    """
    names = [[name for name, _ in layers] for layers in block_linears(model)]
    precisions = precisions_of(quantisation, len(names))
    for precision, layers in zip(precisions, names, strict=True):
        for name in layers:
            model.set_submodule(name, _quantised(model.get_submodule(name), precision))


def _quantised(plain: Any, precision: str) -> QuantisedLinear:
    has_bias = plain.bias is not None
    layer = QuantisedLinear(plain.in_features, plain.out_features, precision, bias=has_bias)
    if not plain.weight.is_meta:
        layer.pack(plain.weight)
        layer.bias = plain.bias
        layer.requires_grad_(False)
    return layer


def dequantise(model: nn.Module) -> None:
    """Replace quantised layers by plain ones with the rounded weights in float32, in place."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantisedLinear)]
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
