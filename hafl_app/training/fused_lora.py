"""PEFT's LoRA layer with the same result in fewer operations.

PEFT adds ``scaling * (x A^T) B^T`` for one adapter after another, each with a product, a scaled
copy and a sum as large as the layer's output. Here the adapters' factors are stacked, their
product is added to the output in place, and only what is trained gets gradients:

``y = x W^T + b + (x A^T) (s B)^T``, with ``A`` and ``s B`` all active components,
``dx = dy W + (dy s B) A``, ``dA = (dy s B)^T x``, ``d(s B) = dy^T (x A^T)`` of the trained ones.
For dA the inputs x are kept until then, for d(s B) the inner products x A^T; neither is kept, nor a
product made, for a factor that is not trained.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hafl_app.training.quantization.linear import QuantizedLinear, computing_type


def fuse(model: nn.Module) -> None:
    """Replace the forward pass of every LoRA layer over a plain or quantized linear layer.

    Parameters
    ----------
    model
        With PEFT's adapters injected; its parameters, names and adapters stay as they are.
    """
    for layer in model.modules():
        # Layers of other kinds compute in ways of their own.
        if type(layer) is Linear and type(layer.base_layer) in {nn.Linear, QuantizedLinear}:
            layer.__class__ = FusedLoraLinear


class FusedLoraLinear(Linear):
    """PEFT's LoRA layer; it computes as PEFT does where dropout or a merge asks for it.

    Attributes
    ----------
    cohort
        Computes the output for rows of several clients from base layer and input; None for one
        client's, see `hafl_app.training.cohort_lora`.
    """

    cohort: Callable[[nn.Module, Tensor], Tensor] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output for ``x`` of shape ``(..., in_features)``."""
        if self.cohort is not None:
            return self.cohort(self.base_layer, x)
        names = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or self._is_special(names) or self._mixes_types(x, names):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base: Any = self.base_layer
        dtype = computing_type(x)
        trained = [name for name in names if self._is_trained(name)]
        frozen = [name for name in names if name not in trained]
        output: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            x.to(dtype),
            base,
            None if base.bias is None else base.bias.to(dtype),
            *self._stacked(trained, dtype),
            *self._stacked(frozen, dtype),
        )
        return output

    def _is_special(self, names: Sequence[str]) -> bool:
        if not names or self.disable_adapters or self.merged or self.lora_variant:
            return True
        dropouts = (self.lora_dropout[name] for name in names)
        return self.training and not all(isinstance(d, nn.Identity) for d in dropouts)

    def _mixes_types(self, x: Tensor, names: Sequence[str]) -> bool:
        # Without autocast PEFT computes in the factors' type and returns that of the base model.
        factors = (self._lora_A(name) for name in names)
        return not _is_autocast(x) and any(factor.dtype != x.dtype for factor in factors)

    def _lora_A(self, name: str) -> Tensor:
        factor: Any = self.lora_A[name].weight
        return cast(Tensor, factor)

    def _is_trained(self, name: str) -> bool:
        lora_B: Any = self.lora_B[name].weight
        return bool(self._lora_A(name).requires_grad or lora_B.requires_grad)

    def _stacked(
        self, names: Sequence[str], dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return ``A`` and ``s B`` of these adapters, one below and one beside the other."""
        if not names:
            return None, None
        As = [self._lora_A(name).to(dtype) for name in names]
        Bs = [(self.lora_B[name].weight * self.scaling[name]).to(dtype) for name in names]
        return _joined(As, 0), _joined(Bs, 1)


def _is_autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


class _LoraLinear(torch.autograd.Function):
    """A linear layer with trained and frozen components; its own weight and ``bias`` are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: nn.Linear,
        bias: Tensor | None,
        trained_A: Tensor | None,
        trained_B: Tensor | None,
        frozen_A: Tensor | None,
        frozen_B: Tensor | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weight = dense_weight(layer, x.dtype)
        A = _joined([A for A in (trained_A, frozen_A) if A is not None], 0)  # (R, in)
        B = _joined([B for B in (trained_B, frozen_B) if B is not None], 1)  # (out, R)
        inner = rows @ A.T  # (n, R)
        output = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        output.addmm_(inner, B.T)
        ctx.rank = 0 if trained_A is None else trained_A.shape[0]
        # Rows are needed for dA of the trained components alone, inner products for their d(s B).
        needs_dA, needs_dB = ctx.needs_input_grad[3:5]
        kept = (
            rows if needs_dA else None,
            inner[:, : ctx.rank].contiguous() if needs_dB else None,
        )
        ctx.layer = layer
        # Of a quantized weight the dense one is made twice, so that not all live at once.
        ctx.save_for_backward(None if is_quantized(layer) else weight, A, B, *kept)
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, A, B, rows, inner = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])  # (n, out)
        dx = dA = dB = through = None
        if ctx.needs_input_grad[0]:
            if weight is None:
                weight = dense_weight(ctx.layer, flat.dtype)
            through = flat @ B  # (n, R)
            dx = (flat @ weight).addmm_(through, A).view(*gradient.shape[:-1], A.shape[1])
        if rows is not None:
            into_A = flat @ B[:, : ctx.rank] if through is None else through[:, : ctx.rank]
            dA = into_A.T @ rows
        if inner is not None:
            dB = flat.T @ inner
        return dx, None, None, dA, dB, None, None


def is_quantized(layer: nn.Linear) -> bool:
    """Whether a layer makes its weight dense whenever it computes with it."""
    return isinstance(layer, QuantizedLinear)


def dense_weight(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """Return a plain or quantized layer's weight ``(out, in)``."""
    return layer.dense(dtype) if isinstance(layer, QuantizedLinear) else layer.weight.to(dtype)
