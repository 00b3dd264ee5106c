"""Floating-point operations of a client's work: counted once for a model, computed for a plan.

Only matrix products count, two operations for each multiplication with its addition, as
`torch.utils.flop_counter` counts them. The operations of a row are ``c0 + c1 L + c2 L^2`` in its
length ``L``; the three numbers are solved from counts at three lengths, on fake tensors, at rank 1.
What other ranks add is known from the layers' sizes: with ``n`` tokens through a layer, ``R``
components held and ``t`` of them trained, as `hafl_app.training.fused_lora` computes,

``forward = 2 n (in + out) R``, and back ``2 n (in + out) R`` for the gradient of the input where
it is needed, ``2 n in t`` for ``lora_A`` and ``2 n out t`` for ``lora_B`` where they are trained.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hafl_app.kept import kept
from hafl_app.plan import HeadPolicy, TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.training.lora_model import LoraModel, LoraSpec, with_quantization
from hafl_app.training.quantization.precisions import NOT_QUANTIZED
from hafl_app.training.step_memory import config_digest, replace_tensors, weightless
from hafl_app.training.work import Pass

_LENGTHS = (2, 3, 4)  # three of them decide a parabola; short ones fit every model
_RANK = 1  # at which is counted


class FlopCounter(FlopCounterMode):
    """Torch's counter, which also counts products that are added in place."""

    def __init__(self) -> None:
        in_place = {torch.ops.aten.addmm_: _of_product}
        super().__init__(display=False, custom_mapping=in_place)


def _of_product(_: Sequence[int], left: Sequence[int], right: Sequence[int], **rest: object) -> int:
    """Return the operations of ``left @ right`` from their shapes."""
    del rest
    return 2 * left[0] * left[1] * right[1]


@dataclass(frozen=True)
class RowFlops:
    """Operations of one row of a model, without its adapters.

    Parameters
    ----------
    forward, backward
        ``(c0, c1, c2)`` of the frozen model and its head. With gradient checkpointing the way back
        computes the way there once more.
    layers
        Adapted layer to ``(out_features, in_features, k0, k1)``: ``k0 + k1 L`` tokens of a row go
        through it.
    first
        Layers whose inputs need no gradient: nothing is trained before them.
    forwards
        How often a training step computes the way there: 1, or 2 with gradient checkpointing.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    layers: Mapping[str, Sequence[float]]
    first: Sequence[str]
    forwards: int

    def evaluation(self, plan: TrainPlan, length: int) -> float:
        """Return the operations of scoring one row of ``length`` tokens under a plan."""
        held = (self._lora_forward(n, len(m.held), length) for n, m in plan.modules.items())
        return _parabola(self.forward, length) + sum(held)

    def training(self, plan: TrainPlan, length: int) -> float:
        """Return the operations of one row of ``length`` tokens in a training step of a plan.

        Gradients are counted back to the first adapted layer, whichever the plan trains.
        """
        back = (self._lora_backward(name, module, length) for name, module in plan.modules.items())
        return (
            self.forwards * self.evaluation(plan, length)
            + _parabola(self.backward, length)
            + sum(back)
        )

    def of_passes(self, passes: Iterable[Pass]) -> float:
        """Return the operations of a whole training."""
        return sum(
            count * self.training(one.plan, length)
            for one in passes
            for length, count in one.rows.items()
        )

    def of_scores(self, plan: TrainPlan, lengths: Iterable[int]) -> float:
        """Return the operations of scoring rows of these lengths, each by itself."""
        counted = Counter(map(int, lengths))
        return sum(count * self.evaluation(plan, length) for length, count in counted.items())

    def _tokens(self, name: str, length: int) -> float:
        _, _, fixed, per_token = self.layers[name]
        return fixed + per_token * length

    def _lora_forward(self, name: str, held: int, length: int) -> float:
        out_features, in_features, *_ = self.layers[name]
        return 2 * self._tokens(name, length) * (in_features + out_features) * held

    def _lora_backward(self, name: str, module: ModulePlan, length: int) -> float:
        out_features, in_features, *_ = self.layers[name]
        held, trained = len(module.held), len(module.trainable)
        numbers = 0.0
        if name not in self.first:
            numbers += (in_features + out_features) * held
        elif module.trains_A:
            numbers += out_features * trained
        if module.trains_A:
            numbers += in_features * trained
        if module.trains_B:
            numbers += out_features * trained
        return 2 * self._tokens(name, length) * numbers


def row_flops(
    spec: LoraSpec,
    *,
    head: HeadPolicy = "averaged",
    checkpointing: bool = False,
    folder: Path | None = None,
) -> RowFlops:
    """Count the operations of a model's rows, or read what was counted before.

    Parameters
    ----------
    head
        A frozen head has no gradient.
    checkpointing
        Whether activations are computed again on the way back.
    folder
        Where counts are kept, by everything they depend on; None counts anew.

    Raises
    ------
    hafl_app.training.locate.ModelError
        If the base model's configuration is not there.
    """
    # Making weights dense is no matrix product.
    spec = with_quantization(spec, NOT_QUANTIZED)

    def count() -> RowFlops:
        return _count(spec, head, checkpointing)

    if folder is None:
        return count()
    counted = {
        "spec": asdict(spec),  # type: ignore[call-overload]
        "config": config_digest(spec.base.path),
        "head": head,
        "checkpointing": checkpointing,
        "versions": [str(torch.__version__), transformers.__version__],
    }
    return kept(folder, counted, RowFlops, count)


def _count(spec: LoraSpec, head: HeadPolicy, checkpointing: bool) -> RowFlops:
    model, plan = weightless(spec, ModulePlan(tuple(range(_RANK)), tuple(range(_RANK))))
    plan = replace(plan, head=head)
    model.checkpoint_gradients(checkpointing)
    model.head_module.requires_grad_(head != "frozen")
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), _Inputs(model) as inputs:
        replace_tensors(model, torch.device("cpu"))
        counts = np.array([_count_row(model, length) for length in _LENGTHS], dtype=np.float64)
    sizes = model.shapes()
    tokens = {name: _line(inputs.tokens[name], 1 + checkpointing) for name in sizes}
    bare = RowFlops(
        forward=(0.0, 0.0, 0.0),
        backward=(0.0, 0.0, 0.0),
        layers={
            name: (size.out_features, size.in_features, *tokens[name])
            for name, size in sizes.items()
        },
        first=[name for name in sizes if name not in inputs.with_gradient],
        forwards=1 + checkpointing,
    )
    # What the adapters of rank 1 cost is taken off again.
    forward = counts[:, 0] - [bare.evaluation(plan, length) for length in _LENGTHS]
    whole = counts.sum(axis=1) - [bare.training(plan, length) for length in _LENGTHS]
    return replace(
        bare,
        forward=_solve(forward),
        backward=_solve(whole - bare.forwards * forward),
    )


def _count_row(model: LoraModel, length: int) -> tuple[int, int]:
    """Return the operations of one row there and back."""
    with FlopCounter() as there:
        loss = model.loss(model.blank_batch(1, length))
    with FlopCounter() as back:
        loss.backward()  # type: ignore[no-untyped-call]
    return there.get_total_flops(), back.get_total_flops()


class _Inputs:
    """Watches the adapted layers' inputs.

    Attributes
    ----------
    tokens
        By layer, the tokens that went through it in each call; with checkpointing also again.
    with_gradient
        Layers whose inputs need a gradient.
    """

    def __init__(self, model: LoraModel) -> None:
        self._model = model
        self._handles: list[Any] = []
        self.tokens: dict[str, list[int]] = {name: [] for name in model.layers}
        self.with_gradient: set[str] = set()

    def __enter__(self) -> "_Inputs":
        for name, layer in self._model.layers.items():
            module = cast(nn.Module, layer)
            hook = module.register_forward_pre_hook(self._noting(name))
            self._handles.append(hook)
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _noting(self, name: str) -> Any:
        def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            del layer
            self.tokens[name].append(inputs[0].numel() // inputs[0].shape[-1])
            if inputs[0].requires_grad:
                self.with_gradient.add(name)

        return note


def _line(tokens: Sequence[int], forwards: int) -> tuple[float, float]:
    """Return ``k0, k1`` of a layer's tokens, from all calls for rows of `_LENGTHS`."""
    each = np.reshape(tokens, (len(_LENGTHS), -1)).sum(axis=1) / forwards
    per_token = float(each[1] - each[0]) / (_LENGTHS[1] - _LENGTHS[0])
    return float(each[0]) - per_token * _LENGTHS[0], per_token


def _solve(counts: Any) -> tuple[float, float, float]:
    """Return the parabola through counts at `_LENGTHS`; whole but for rounding."""
    powers = np.vander(np.array(_LENGTHS, dtype=np.float64), increasing=True)
    c0, c1, c2 = np.round(2 * np.linalg.solve(powers, counts)) / 2
    return float(c0), float(c1), float(c2)


def _parabola(coefficients: Sequence[float], length: int) -> float:
    c0, c1, c2 = coefficients
    return c0 + c1 * length + c2 * length**2
