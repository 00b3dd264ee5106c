"""LoRA layers and heads that serve the rows of several clients in one pass.

A batch holds the rows of ``K`` clients one behind another, the same number of each. A layer's
frozen weight is multiplied with all of them at once, each client's factors with its own rows:

``y_k = x_k W^T + b + (x_k A_k^T) (s_k B_k)^T``, the last part as batched products over ``k``.

Clients of lower rank are filled up with components that are zero: they add nothing, and get no
gradient.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.training.batches import Examples
from hafl_app.training.fused_lora import dense_weight, is_quantized
from hafl_app.training.lora_layers import FROZEN, TRAINABLE
from hafl_app.training.lora_model import LoraModel, trained_adapter
from hafl_app.training.quantization.linear import computing_type


@dataclass(frozen=True)
class LayerFactors:
    """Factors of one client in one layer, trained and frozen; not in them: scaling times gain."""

    trained: tuple[nn.Parameter, nn.Parameter]
    frozen: tuple[nn.Parameter, nn.Parameter]
    scaling: float


class ClientAdapter:
    """One client's factors and head, taken out of the model that they were loaded into.

    Parameters
    ----------
    model
        It may load other factors afterwards.
    plan
        With which the client's were loaded.
    """

    def __init__(self, model: LoraModel, plan: TrainPlan) -> None:
        self._model = model
        self.device = model.device
        self.layers = {
            name: LayerFactors(
                _weights(layer, TRAINABLE),
                _weights(layer, FROZEN),
                plan.modules[name].scaling * plan.modules[name].gain,
            )
            for name, layer in model.layers.items()
        }
        # A load overwrites the head's tensors, while it makes new ones for the factors.
        self.head_module = copy.deepcopy(model.head_module)
        self._trainable = {
            name: layer.trained for name, layer in self.layers.items() if layer.trained[0].numel()
        }
        pairs = [p for pair in self._trainable.values() for p in pair if p.requires_grad]
        self._with_gradients = [*pairs, *self.head_module.parameters()]

    def train(self) -> None:
        """Enter training mode."""
        self.head_module.train()
        if not self._model.training:  # the walk through the base model is long
            self._model.train()

    def trainable_factors(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """See `LoraModel.trainable_factors`."""
        return self._trainable

    def trainable_scales(self) -> list[nn.Parameter]:
        """See `LoraModel.trainable_scales`: a client with cores trains alone."""
        return []

    def trained(self, plan: TrainPlan) -> Adapter:
        """See `LoraModel.trained`."""
        factors = {
            name: LoraFactors(*(p.detach() for p in layer.trained))
            for name, layer in self.layers.items()
        }
        return trained_adapter(factors, self.head_module, plan)

    def num_targets(self, examples: Examples, rows: NDArray[np.int64]) -> int:
        """See `LoraModel.num_targets`."""
        return self._model.num_targets(examples, rows)

    def clear_gradients(self) -> None:
        """Forget all gradients."""
        for parameter in self._with_gradients:
            parameter.grad = None


class Cohort:
    """Clients whose rows a model reads in one pass.

    Parameters
    ----------
    model
        Whose adapted layers are all `FusedLoraLinear`.
    """

    def __init__(self, model: LoraModel) -> None:
        self._model = model
        self._clients: tuple[ClientAdapter, ...] = ()
        self._stacked: dict[str, _Stacked] = {}

    @contextmanager
    def reading(self, clients: Sequence[ClientAdapter]) -> Iterator[None]:
        """Let the model read the rows of these clients, in equal parts, and not what is loaded."""
        self._stack(clients)
        layers: dict[str, Any] = dict(self._model.layers)
        head: Any = self._model.head_module
        try:
            for name, layer in layers.items():
                layer.cohort = partial(self._layer, name)
            if next(head.parameters(), None) is not None:
                head.forward = self._head
            yield
        finally:
            for layer in layers.values():
                layer.cohort = None
            head.__dict__.pop("forward", None)

    @torch.no_grad()
    def _stack(self, clients: Sequence[ClientAdapter]) -> None:
        """Stack the factors of these clients as they are now."""
        if self._clients != tuple(clients):
            self._clients = tuple(clients)
            self._stacked = {
                name: _Stacked([client.layers[name] for client in clients])
                for name in self._model.layers
            }
        copies = [copy for stacked in self._stacked.values() for copy in stacked.copies]
        scaled = [(into, scaling) for into, _, scaling in copies if scaling != 1.0]
        if copies:
            torch._foreach_copy_([into for into, _, _ in copies], [of for _, of, _ in copies])
        if scaled:
            torch._foreach_mul_([into for into, _ in scaled], [s for _, s in scaled])

    def _layer(self, name: str, base: Any, x: Tensor) -> Tensor:
        dtype, stacked = computing_type(x), self._stacked[name]
        output: Tensor = _CohortLinear.apply(  # type: ignore[no-untyped-call]
            x.to(dtype),
            base,
            None if base.bias is None else base.bias.to(dtype),
            stacked,
            *stacked.parameters,
        )
        return output

    def _head(self, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = features.chunk(len(self._clients))
        heads = [client.head_module for client in self._clients]
        return torch.cat([h(p, *args, **kwargs) for h, p in zip(heads, parts, strict=True)])


class _Stacked:
    """Factors of K clients in one layer, filled up to the same ranks.

    Attributes
    ----------
    A, B
        ``(K, R, in)`` and, the scaling in it, ``(K, out, R)``: first the trained components.
    trained
        Most trained components of a client.
    scalings
        ``(K, 1, 1)``.
    parameters
        The trained lora_A of all clients, then the trained lora_B.
    copies
        Parts of `A` and `B` and the trained factors that belong there, with what they are scaled
        by: an optimizer step changes these, and nothing else.
    """

    def __init__(self, clients: Sequence[LayerFactors]) -> None:
        As, Bs = [c.trained[0] for c in clients], [c.trained[1] for c in clients]
        self.parameters = (*As, *Bs)
        self.trained = most = max(len(A) for A in As)
        rank = most + max(len(c.frozen[0]) for c in clients)
        self.A = As[0].new_zeros(len(clients), rank, As[0].shape[1])
        self.B = Bs[0].new_zeros(len(clients), Bs[0].shape[0], rank)
        self.scalings = self.A.new_tensor([c.scaling for c in clients]).view(-1, 1, 1)
        self.copies: list[tuple[Tensor, Tensor, float]] = []
        for client, into_A, into_B in zip(clients, self.A, self.B, strict=True):
            (lora_A, lora_B), (frozen_A, frozen_B) = client.trained, client.frozen
            if len(lora_A):
                self.copies.append((into_A[: len(lora_A)], lora_A, 1.0))
                self.copies.append((into_B[:, : len(lora_A)], lora_B, client.scaling))
            into_A[most : most + len(frozen_A)] = frozen_A.detach()
            into_B[:, most : most + len(frozen_A)] = frozen_B.detach() * client.scaling

    def shares(self, gradients: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Any]:
        """Return each parameter's part of the gradients of all lora_A and all lora_B."""
        dA, dB = (None if g is None else g.to(self.A.dtype) for g in gradients)
        half = len(self.parameters) // 2
        ranks = [len(A) for A in self.parameters[:half]]
        into_A = [None if dA is None else dA[k, :rank] for k, rank in enumerate(ranks)]
        into_B = [None if dB is None else dB[k, :, :rank] for k, rank in enumerate(ranks)]
        return [g if n else None for g, n in zip((*into_A, *into_B), needed, strict=True)]


class _CohortLinear(torch.autograd.Function):
    """A frozen linear layer on the rows of K clients, each with trained and frozen components."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: nn.Linear,
        bias: Tensor | None,
        stacked: _Stacked,
        *parameters: Tensor,
    ) -> Tensor:
        A, B = stacked.A.to(x.dtype), stacked.B.to(x.dtype)
        clients, trained = len(A), stacked.trained
        rows = x.reshape(-1, x.shape[-1])
        grouped = rows.view(clients, -1, x.shape[-1])  # (K, n, in)
        weight = dense_weight(layer, x.dtype)
        inner = torch.bmm(grouped, A.mT)  # (K, n, R)
        output = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        output.view(clients, -1, output.shape[-1]).baddbmm_(inner, B.mT)
        # As in `fused_lora`: what no gradient is made of is not kept.
        half = 4 + len(parameters) // 2
        kept = (
            grouped if any(ctx.needs_input_grad[4:half]) else None,
            inner[:, :, :trained].contiguous() if any(ctx.needs_input_grad[half:]) else None,
        )
        ctx.layer, ctx.stacked = layer, stacked
        ctx.save_for_backward(None if is_quantized(layer) else weight, A, B, *kept)
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        weight, A, B, grouped, inner = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        by_client = flat.view(len(A), -1, flat.shape[-1])  # (K, n, out)
        trained = ctx.stacked.trained
        dx = dA = dB = through = None
        if ctx.needs_input_grad[0]:
            if weight is None:
                weight = dense_weight(ctx.layer, flat.dtype)
            through = torch.bmm(by_client, B)  # (K, n, R)
            dx = flat @ weight
            dx.view(len(A), -1, A.shape[2]).baddbmm_(through, A)
            dx = dx.view(*gradient.shape[:-1], A.shape[2])
        if grouped is not None:
            into_A = torch.bmm(by_client, B[:, :, :trained]) if through is None else through
            dA = torch.bmm(into_A[:, :, :trained].mT, grouped)
        if inner is not None:
            dB = torch.bmm(by_client.mT, inner) * ctx.stacked.scalings.to(flat.dtype)
        shares = ctx.stacked.shares((dA, dB), ctx.needs_input_grad[4:])
        return dx, None, None, None, *shares


def _weights(layer: Any, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[name].weight, layer.lora_B[name].weight
