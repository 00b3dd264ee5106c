"""Memory of a training step, counted without running it.

The step runs on PyTorch's fake tensors, which have a shape, a type and a device but no numbers, and
every tensor is counted as long as it lives: weights, adapter, activations, gradients, the
optimizer's moments, the importance averages and all temporaries. Nothing is loaded or allocated.
"""

import hashlib
import weakref
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hafl_app.kept import kept
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan, TrainedFactors
from hafl_app.training.device import resolve_precision
from hafl_app.training.importance_meter import ImportanceMeter
from hafl_app.training.lora_model import LoraModel, LoraSpec
from hafl_app.training.optimizer import build_optimizer
from hafl_app.training.settings import TrainOptions

_MEGABYTE = 1e6
# Memory of a device beside the tensors: MB of its own, and its allocator's factor for those that
# live. On the CPU, measured with MiniLM and glibc: Python and its libraries 600 MB, and 1.9 to 2.7
# times the tensors, because blocks below 32 MB leave holes in the heap. On CUDA an assumption:
# the process's context is not in the free memory, but cuBLAS takes a workspace.
_BESIDE_TENSORS = {"cpu": (650.0, 2.7), "cuda": (100.0, 1.15)}


@dataclass(frozen=True)
class StepMemory:
    """Memory of a training step by rank: counted at both ends, linear between.

    Weights, gradients, moments and activations are linear in the rank. The peak is the largest of
    several such sums and thus convex, with the line above it. The upper end is one below the
    largest rank, and the line goes on from there: where nothing is frozen a step needs less.

    Parameters
    ----------
    device
        Kind of the device, ``cpu`` or ``cuda``.
    weights
        Bytes of the frozen base model.
    lowest, highest
        Peak bytes of all tensors at rank 1, and the estimate at ``max_rank``.
    max_rank
        Largest rank, at least 1; above 1 unless both peaks are the same.
    """

    device: str
    weights: int
    lowest: int
    highest: int
    max_rank: int

    def tensors_mb(self, rank: int) -> float:
        """Return the peak of all tensors at a rank from 1 to ``max_rank``, in MB of 10^6 bytes."""
        share = (rank - 1) / max(1, self.max_rank - 1)
        return (self.lowest + share * (self.highest - self.lowest)) / _MEGABYTE

    def needed_mb(self, rank: int) -> float:
        """Return the memory that training at a rank needs in all, in MB of 10^6 bytes.

        On the CPU the whole process; on CUDA the device's memory.
        """
        fixed, factor = _BESIDE_TENSORS[self.device]
        weights = self.weights / _MEGABYTE
        return fixed + weights + factor * (self.tensors_mb(rank) - weights)

    def largest_rank(self, limit_mb: float) -> int:
        """Return the largest rank that fits into so many MB, 0 if not even rank 1 does."""
        ranks = range(self.max_rank, 0, -1)
        return next((rank for rank in ranks if self.needed_mb(rank) <= limit_mb), 0)


def step_memory(
    spec: LoraSpec,
    max_rank: int,
    options: TrainOptions,
    length: int,
    device: torch.device,
    folder: Path | None = None,
) -> StepMemory:
    """Count the memory of a training step, or read what was counted before.

    Parameters
    ----------
    max_rank
        Of the adapter. A client that trains fewer components is counted with the rest of them
        frozen beside, as much as any method sends it, and with both factors trained.
    options, length
        Texts at once, optimizer, precision and checkpointing, and the tokens of a text.
    folder
        Where counts are kept, by everything they depend on; None counts anew.

    Raises
    ------
    hafl_app.training.locate.ModelError
        If the base model's configuration is not there.
    """

    def count() -> StepMemory:
        lowest = count_step(spec, 1, max_rank, options, length, device)
        upper = max(max_rank - 1, min(max_rank, 2))
        near = count_step(spec, upper, max_rank, options, length, device).peak
        a_rank = (near - lowest.peak) / max(1, upper - 1)
        highest = round(near + a_rank * (max_rank - upper))
        return StepMemory(device.type, lowest.weights, lowest.peak, highest, max_rank)

    if folder is None:
        return count()
    counted = {
        "spec": asdict(spec),  # type: ignore[call-overload]
        "config": config_digest(spec.base.path),
        "max_rank": max_rank,
        "batch": [options.texts_at_once, length, options.optimizer],
        "precision": resolve_precision(options.precision, device),
        "checkpointing": options.gradient_checkpointing,
        "device": device.type,
        "versions": [str(torch.__version__), transformers.__version__],
    }
    return kept(folder, counted, StepMemory, count)


def config_digest(path: str) -> str:
    """Return a digest of a local model's configuration, which may change under the same name."""
    file = Path(path).expanduser() / "config.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a step's tensors: frozen base model, and the peak of everything together."""

    weights: int
    peak: int


def count_step(
    spec: LoraSpec,
    rank: int,
    held: int,
    options: TrainOptions,
    length: int,
    device: torch.device,
    factors: TrainedFactors = "both",
) -> StepBytes:
    """Count the tensors of two training steps; the second has the optimizer's moments.

    Parameters
    ----------
    rank, held
        Components that are trained, and those that are there: 1 <= rank <= held.
    options, length, device
        As in `step_memory`. The device must be there, because it decides which kernels run.
    factors
        Which of the components' are trained, as in a `ModulePlan`.
    """
    module = ModulePlan(tuple(range(held)), tuple(range(rank)), factors=factors)
    model, plan = weightless(spec, module)
    model.hold_weights(resolve_precision(options.precision, device))
    model.checkpoint_gradients(options.gradient_checkpointing)
    longest = getattr(model.base.config, "max_position_embeddings", length)
    shape = (options.texts_at_once, min(length, longest))
    with FakeTensorMode(), LiveBytes() as live:
        replace_tensors(model, device)
        frozen = [
            parameter
            for name, parameter in model.base.named_parameters()
            if not parameter.requires_grad and ".lora_" not in name
        ]
        weights = sum(p.numel() * p.element_size() for p in frozen)
        optimizer = build_optimizer(model, plan, options)
        meter = ImportanceMeter(plan.importance, plan.importance_smoothing)
        for _ in range(2):
            training_step(model, options, shape, optimizer, meter)
    return StepBytes(weights, live.peak)


def weightless(spec: LoraSpec, module: ModulePlan) -> tuple[LoraModel, TrainPlan]:
    """Return the model on the meta device, every adapted module planned alike, and its plan."""
    held = len(module.held)
    base = replace(spec.base, random_weights=True)
    random: LoraSpec = replace(spec, base=base)  # type: ignore[type-var]
    with torch.device("meta"):
        model = random.build()
        modules = {
            name: LoraFactors(torch.empty(held, s.in_features), torch.empty(s.out_features, held))
            for name, s in model.shapes().items()
        }
        # The costliest importance: a plan that asks for none needs less.
        plan = TrainPlan(dict.fromkeys(modules, module), importance="smoothed")
        model.load(Adapter(modules), plan)
    return model.train(), plan


def replace_tensors(model: nn.Module, device: torch.device) -> None:
    """Replace all parameters and buffers by tensors of the current mode."""
    replaced: dict[int, nn.Parameter] = {}  # tied weights stay one tensor
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in replaced:
                tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                replaced[id(parameter)] = nn.Parameter(tensor, parameter.requires_grad)
            setattr(module, name, replaced[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


def training_step(
    model: LoraModel,
    options: TrainOptions,
    shape: tuple[int, int],
    optimizer: torch.optim.Optimizer,
    meter: ImportanceMeter,
) -> None:
    """Run the step of `hafl_app.training.local` without reading a number."""
    model.zero_grad(set_to_none=True)
    with model.computing(options.precision):
        loss = model.loss(model.blank_batch(*shape))
    loss.backward()  # type: ignore[no-untyped-call]
    meter.update(model)
    if options.max_grad_norm:
        nn.utils.clip_grad_norm_(list(model.parameters()), options.max_grad_norm)
    optimizer.step()


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations make, for as long as they live.

    Attributes
    ----------
    live, peak
        Bytes alive now, and the most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._storages: dict[int, int] = {}

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what is new; what came in from outside is not."""
        self._note((args, kwargs), counts=False)
        result = operation(*args, **(kwargs or {}))
        self._note(result, counts=True)
        self.peak = max(self.peak, self.live)
        return result

    def _note(self, tree: Any, *, counts: bool) -> None:
        for leaf in tree_leaves(tree):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key not in self._storages:
                self._storages[key] = storage.nbytes() if counts else 0
                self.live += self._storages[key]
                weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._storages.pop(key)
