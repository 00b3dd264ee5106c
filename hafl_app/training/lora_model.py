"""A base model with swappable LoRA factors, resident in a process: what every task shares."""

import contextlib
import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from hafl_app.lowrank.cores import frozen_bases, with_cores
from hafl_app.lowrank.factors import Adapter, LoraFactors, ModuleShape
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.training.base_model import base_without_weights, load_base
from hafl_app.training.batches import Batch, Examples, ImageBatch
from hafl_app.training.core_linear import CoreLinear
from hafl_app.training.device import autocast, resolve_precision
from hafl_app.training.fused_lora import fuse
from hafl_app.training.half_precision import restore_weights, round_weights
from hafl_app.training.locate import ModelError
from hafl_app.training.lora_layers import (
    FROZEN,
    TRAINABLE,
    AdapterFitError,
    check_fit,
    factors_of,
    freeze_untrained,
    inject,
    put_components,
    put_core,
    trained_factors,
)
from hafl_app.training.own_classes import OwnClasses
from hafl_app.training.settings import BaseSpec
from hafl_app.training.target_modules import resolve_targets


class LoraSpec(Protocol):
    """Identity of a model's weights before training; one class for each task."""

    @property
    def base(self) -> BaseSpec:
        """The frozen base model."""

    @property
    def num_labels(self) -> int:
        """Classes; 0 for a model without any."""

    @property
    def target_modules(self) -> str | tuple[str, ...]:
        """``all-linear``, or names or ends of names of modules."""

    @property
    def lora_dropout(self) -> float:
        """Dropout before the trainable factors, in [0, 1)."""

    @property
    def seed(self) -> int:
        """Seed of all weights that the base model's files do not hold."""

    def __hash__(self) -> int:
        """Hash equal specs alike."""

    def build(self) -> "LoraModel":
        """Return the model."""

    def initial_head(self) -> dict[str, Tensor]:
        """Return the head's tensors before training; of the base model's files no more than it."""

    def unadapted(self, base: PreTrainedModel) -> nn.Module:
        """Return the part of a base model that is never adapted, whatever its layers are named."""


class LoraModel(nn.Module, ABC):
    """A model whose LoRA factors are replaced in place, whatever their ranks.

    Every adapted layer carries two PEFT adapters, of which a plan fills the needed ones: the
    components that are trained, and those that only stay in the forward pass. Swapping in another
    client's factors rebuilds nothing.

    Attributes
    ----------
    base
        The base model with the factors in it.
    head_module
        Head, which is trained beside the factors; a module without parameters if there is none.
    layers
        The adapted layers by name.
    initial_head
        The head's tensors before training.
    """

    def __init__(self, spec: LoraSpec) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            self.base = load_base(spec.base, spec.num_labels)
            self.head_module = self._make_head(spec)
            targets = resolve_targets(self.base, spec.target_modules, spec.unadapted(self.base))
            inject(self.base, targets, TRAINABLE, spec.lora_dropout)
            inject(self.base, targets, FROZEN, 0.0)
            fuse(self.base)
        self.layers: dict[str, LoraLayer] = {
            name: module
            for name, module in self.base.named_modules()
            if isinstance(module, LoraLayer)
        }
        self.initial_head = {
            k: v.detach().clone() for k, v in self.head_module.state_dict().items()
        }
        self._spec = spec
        self._precision = "fp32"
        self._with_gradients: list[nn.Parameter] = []
        self._checkpoints_gradients = False

    @abstractmethod
    def _make_head(self, spec: LoraSpec) -> nn.Module:
        """Return the head, which may be a part of the base model."""

    @abstractmethod
    def batch(self, examples: Examples, rows: NDArray[np.int64]) -> Batch | ImageBatch:
        """Return rows on this model's device; those of text are padded."""

    @abstractmethod
    def predictions(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return logits ``(rows, ..., classes)`` and their targets ``(rows, ...)``."""

    def loss(self, batch: Any, own_classes: OwnClasses | None = None) -> Tensor:
        """Return the mean cross entropy over the targets of what `batch` returned."""
        return mean_loss(*self.predictions(batch), own_classes)

    @abstractmethod
    def num_targets(self, examples: Examples, rows: NDArray[np.int64]) -> int:
        """Count what the loss of a batch of these rows is a mean over."""

    def row_length(self, examples: Examples, rows: NDArray[np.int64]) -> int:
        """Return the tokens of the longest of these rows."""
        return int(np.diff(examples.offsets)[rows].max())

    @abstractmethod
    def labels_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of a batch's labels; its token ids have ``shape``."""

    def blank_batch(self, rows: int, length: int) -> Batch | ImageBatch:
        """Return a batch that says nothing, in the shape of a real one: to count its costs.

        Parameters
        ----------
        length
            Tokens of each row; images have their model's size.
        """
        shape = (rows, length)
        tokens, mask = (torch.ones(shape, dtype=torch.long, device=self.device) for _ in "tm")
        labels = torch.zeros(self.labels_shape(shape), dtype=torch.long, device=self.device)
        return Batch(tokens, mask, labels)

    @property
    def num_classes(self) -> int:
        """Outputs of the head; 0 for a model without classes."""
        return self._spec.num_labels

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.base.parameters()).device

    @contextlib.contextmanager
    def computing(self, precision: str) -> Iterator[None]:
        """Compute in ``auto``, ``fp32`` or ``bf16``, see `resolve_precision`.

        For bf16 the base model's frozen weights are rounded, and stay so; to go back to fp32 they
        are loaded again.
        """
        precision = resolve_precision(precision, self.device)
        self.hold_weights(precision)
        with autocast(self.device, precision):
            yield

    def hold_weights(self, precision: str) -> None:
        """Hold the base model's frozen weights in ``fp32`` or ``bf16`` from now on."""
        if precision == self._precision:
            return
        # Weights made in inference mode could not be trained through.
        with torch.inference_mode(False):
            if precision == "bf16":
                round_weights(self.base, self.head_module)
            else:
                restore_weights(self.base, self.head_module, self._loaded_anew())
        self._precision = precision

    def _loaded_anew(self) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._spec.seed)
            return load_base(self._spec.base, self._spec.num_labels)

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Compute activations again on the way back instead of keeping them, or keep them.

        Raises
        ------
        ModelError
            If the base model cannot.
        """
        if enabled == self._checkpoints_gradients:
            return  # asking the base model walks through all of it
        base: Any = self.base
        if enabled and not base.supports_gradient_checkpointing:
            raise ModelError(
                f"client.gradient_checkpointing: {type(base).__name__} does not support it"
            )
        with warnings.catch_warnings():
            # The new names of these methods are younger than the oldest version that is supported.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
            if enabled:
                # Not reentrant: the inputs of a frozen base model need no gradients.
                base.gradient_checkpointing_enable({"use_reentrant": False})
                # transformers asks for those of the embeddings all the same, and never ceases to.
                base.disable_input_require_grads()
            else:
                base.gradient_checkpointing_disable()
        self._checkpoints_gradients = enabled

    def shapes(self) -> dict[str, ModuleShape]:
        """Return the size of every adapted layer by name."""
        return {
            name: ModuleShape(int(layer.out_features or 0), int(layer.in_features or 0))
            for name, layer in self.layers.items()
        }

    def load(self, adapter: Adapter, plan: TrainPlan) -> None:
        """Load an adapter: what the plan trains with gradients, all else without.

        Parameters
        ----------
        adapter
            Its modules hold exactly the held components of ``plan``. An empty head
            restores the initial one.
        plan
            Trainable components, which factors of them are trained, and the scaling to unfold
            from ``lora_B``.

        Raises
        ------
        AdapterFitError
            If adapter, plan and model disagree about modules, shapes or ranks.
        """
        for name in {**adapter.modules, **plan.modules}:
            if name not in self.layers:
                raise AdapterFitError(f"module {name!r} is none of the adapted ones")
        # A base model in float64, as tests have it, has factors to match.
        dtype = torch.promote_types(next(self.base.parameters()).dtype, torch.float32)
        for name, layer in self.layers.items():
            if name not in adapter.modules or name not in plan.modules:
                raise AdapterFitError(f"module {name!r} is missing in the adapter or in the plan")
            factors, module = adapter.modules[name], plan.modules[name]
            check_fit(name, layer, factors, module)
            if module.core is not None:
                bases = self._bases(name, module)
                cores, factors = factors, with_cores(factors, bases)
            active = put_components(layer, factors, module, self.device, dtype)
            if module.core is not None:
                slots = module.trainable_slots
                put_core(layer, cores.select(slots), bases.select(slots), module)
            layer.set_adapter(active)
            freeze_untrained(layer, module)
        self.head_module.load_state_dict(dict(adapter.head) or self.initial_head)
        self.head_module.requires_grad_(plan.trains_head)
        pairs = self.trainable_factors().values()
        trained = [p for pair in pairs for p in pair if p.requires_grad]
        trained += self.trainable_scales()
        self._with_gradients = [*trained, *self.head_module.parameters()]

    def _bases(self, name: str, module: ModulePlan) -> LoraFactors:
        """Return the frozen bases of the components that a module's plan holds."""
        if module.core is None:
            raise ValueError(f"module {name!r} has no core")
        whole = frozen_bases(self.shapes(), module.core.rank, module.core.seed)
        return whole[name].select(module.held)

    def load_whole(self, adapter: Adapter) -> None:
        """Load a whole adapter for evaluation."""
        modules = {
            name: ModulePlan(held=tuple(range(f.rank)), trainable=tuple(range(f.rank)))
            for name, f in adapter.modules.items()
        }
        self.load(adapter, TrainPlan(modules))

    def trained(self, plan: TrainPlan) -> Adapter:
        """Return copies of the trained factors, scaling folded in, and of the head.

        A factor that the plan does not train is left out, see `LoraFactors.only`: folding the
        scaling in again would change its last bits. One that the client keeps is there.
        """
        factors = {name: trained_factors(layer) for name, layer in self.layers.items()}
        return trained_adapter(factors, self.head_module, plan)

    def head_state(self) -> dict[str, Tensor]:
        """Return a copy of the head's tensors by name."""
        return _state_of(self.head_module)

    def trainable_factors(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Return ``(lora_A, lora_B)`` of every module that has trainable components.

        Of the two, one that the plan does not train requires no gradient. In place of the lora_B of
        a core stand the cores, ``(size, rank)``.
        """
        factors = {name: factors_of(layer, TRAINABLE) for name, layer in self.layers.items()}
        return {name: pair for name, pair in factors.items() if pair[0].numel()}

    def trainable_scales(self) -> list[nn.Parameter]:
        """Return the factors of the cores that have trained ones, see `CoreLinear`."""
        cores = (layer.lora_B[TRAINABLE] for layer in self.layers.values())
        scales = (core.scales for core in cores if isinstance(core, CoreLinear))
        return [one for one in scales if isinstance(one, nn.Parameter) and one.numel()]

    def clear_gradients(self) -> None:
        """Forget all gradients, without the walk through the whole base model of `zero_grad`."""
        for parameter in self._with_gradients:
            parameter.grad = None


def _state_of(head: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().cpu().clone() for k, v in head.state_dict().items()}


def trained_adapter(
    factors: Mapping[str, LoraFactors], head: nn.Module, plan: TrainPlan
) -> Adapter:
    """Return copies of those of these factors that a plan trains, and of the head.

    Parameters
    ----------
    factors
        As they are trained, the trainable components of every module; the result has the plan's
        scaling folded in.
    """
    modules = {}
    for name, whole in factors.items():
        module = plan.modules[name]
        part = whole.only(module.factors)
        modules[name] = LoraFactors(
            part.lora_A.cpu().clone(), part.lora_B.cpu().clone() * module.scaling
        )
    return Adapter(modules, _state_of(head))


def mean_loss(logits: Tensor, targets: Tensor, own_classes: OwnClasses | None = None) -> Tensor:
    """Return the mean cross entropy over targets ``(rows, ...)``, in float32 or wider.

    Parameters
    ----------
    own_classes
        Of the client whose rows these are, if its loss adjusts logits by them.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if own_classes is not None:
        wide = own_classes.adjust(wide)
    return nn.functional.cross_entropy(wide.flatten(0, -2), targets.flatten())


def adapter_shapes(spec: LoraSpec) -> dict[str, ModuleShape]:
    """Return the size of every layer to adapt by name, without the base model's weights.

    Raises
    ------
    ModelError
        If the base model is not there, or has no layer of a wanted name.
    """
    model = base_without_weights(spec.base, spec.num_labels)
    layers = dict(model.named_modules())
    shapes = {}
    for name in resolve_targets(model, spec.target_modules, spec.unadapted(model)):
        out_features, in_features = cast(nn.Linear, layers[name]).weight.shape
        shapes[name] = ModuleShape(out_features, in_features)
    return shapes


def with_quantization(spec: LoraSpec, quantization: str) -> LoraSpec:
    """Return a spec whose base model is quantized in that way, as in a `BaseSpec`."""
    base = replace(spec.base, quantization=quantization)
    changed: LoraSpec = replace(spec, base=base)  # type: ignore[type-var]
    return changed


@functools.lru_cache(maxsize=1)
def resident_model(spec: LoraSpec) -> LoraModel:
    """Return this process's model for ``spec``: built once, however many clients it serves."""
    return spec.build()
