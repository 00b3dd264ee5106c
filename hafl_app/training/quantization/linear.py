"""A frozen linear layer whose weight is stored in 4, 8 or 16 bits.

Only storage is quantized: the layer makes its weight dense again whenever it computes with it,
forward and backward, so that loss and gradients are exactly those of the rounded weight.
bitsandbytes packs and unpacks:

- ``nf4``: 4 bits, blocks of 64 numbers with a scale each, 4.5 bits in all (Dettmers et al., "QLoRA:
  Efficient Finetuning of Quantized LLMs", NeurIPS 2023, arXiv:2305.14314, section 3).
- ``int8``: 8 bits, a scale for every row (Dettmers et al., "LLM.int8()", NeurIPS 2022,
  arXiv:2208.07339). Differs from the paper: activations are not quantized.
- ``bf16``: the nearest bfloat16; needs no library.
"""

import functools
import importlib
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hafl_app.training.quantization.precisions import require_library

_NF4_BLOCK = 64
# When bitsandbytes is imported, by PEFT for one, it recommends a kernel that is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that computes with a rounded weight.

    It is made on the meta device, with shapes only; `pack` gives it a weight.

    Attributes
    ----------
    precision
        One of `PRECISIONS`.
    weight
        Packed: uint8 of shape ``(32 * blocks, 1)``, int8 or bfloat16 of ``(out, in)``.
    scales
        Float32, of shape ``(blocks,)`` for ``nf4`` and ``(out,)`` for ``int8``; None for ``bf16``.
    """

    scales: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, precision: str, *, bias: bool = True
    ) -> None:
        require_library(precision)
        super().__init__(in_features, out_features, bias=bias, device="meta")
        self.requires_grad_(False)
        self.precision = precision
        self._put(*_empty(out_features, in_features, precision))

    def pack(self, weight: Tensor) -> None:
        """Store a weight of shape ``(out_features, in_features)``, rounded."""
        self._put(*packed(weight, self.precision))

    def _put(self, weight: Tensor, scales: Tensor | None) -> None:
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scales = None if scales is None else nn.Parameter(scales, requires_grad=False)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the rounded weight, of shape ``(out_features, in_features)``."""
        if self.scales is None:
            return self.weight.to(dtype)
        if self.precision == "int8":
            # As bitsandbytes does it, whose two products would take a second dense weight.
            return (self.weight * (self.scales / 127).unsqueeze(1)).to(dtype)
        library = _library()
        state = library.QuantState(
            absmax=self.scales,
            shape=torch.Size((len(self.scales), _NF4_BLOCK)),
            blocksize=_NF4_BLOCK,
            quant_type="nf4",
            dtype=dtype,
        )
        blocks: Tensor = library.dequantize_4bit(self.weight, state)
        numbers = self.out_features * self.in_features
        return blocks.flatten()[:numbers].view(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the parent's name
        """Return the layer's output for an input of shape ``(..., in_features)``."""
        dtype = computing_type(input)
        bias = None if self.bias is None else self.bias.to(dtype)
        output: Tensor = _FrozenLinear.apply(  # type: ignore[no-untyped-call]
            input.to(dtype), self, bias
        )
        return output

    def extra_repr(self) -> str:
        """Return the layer's description for printing."""
        return f"{super().extra_repr()}, precision={self.precision}"


class _FrozenLinear(torch.autograd.Function):
    """``y = x W^T + b``; ``W`` is made dense anew on the way back instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dense(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient @ ctx.layer.dense(gradient.dtype), None, None


def computing_type(x: Tensor) -> torch.dtype:
    """Return the type that a linear layer computes in: that of autocast, else that of its input."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def packed(weight: Tensor, precision: str) -> tuple[Tensor, Tensor | None]:
    """Return a weight of shape ``(out, in)`` as a `QuantizedLinear` stores it, and its scales."""
    whole = weight.detach().float().contiguous()
    if precision == "bf16":
        return whole.to(torch.bfloat16), None
    library = _library()
    if precision == "int8":
        rounded, scales, _ = library.int8_vectorwise_quant(whole)
        return rounded, scales
    # A row for each block, because on CPUs with AVX-512 bitsandbytes 0.50.2 unpacks rows wrongly
    # whose width is a multiple of 16 and not of 64. Zeros behind the last number are never read.
    blocks = nn.functional.pad(whole.flatten(), (0, -whole.numel() % _NF4_BLOCK))
    rounded, state = library.quantize_4bit(
        blocks.view(-1, _NF4_BLOCK), blocksize=_NF4_BLOCK, quant_type="nf4"
    )
    return rounded, state.absmax


def packed_bytes(out_features: int, in_features: int, precision: str) -> int:
    """Return the bytes of a packed weight with its scales, without bias."""
    tensors = _empty(out_features, in_features, precision)
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _empty(out_features: int, in_features: int, precision: str) -> tuple[Tensor, Tensor | None]:
    """Return tensors of the shapes and types of `packed`'s, on the meta device."""
    shape = (out_features, in_features)
    if precision == "bf16":
        return torch.empty(shape, dtype=torch.bfloat16, device="meta"), None
    if precision == "int8":
        rounded = torch.empty(shape, dtype=torch.int8, device="meta")
        return rounded, torch.empty(out_features, device="meta")
    blocks = -(-out_features * in_features // _NF4_BLOCK)
    rounded = torch.empty(blocks * _NF4_BLOCK // 2, 1, dtype=torch.uint8, device="meta")
    return rounded, torch.empty(blocks, device="meta")


@functools.cache
def _library() -> Any:
    return importlib.import_module("bitsandbytes.functional")
