"""Time one client's local training by rank: our way, and plain PEFT in Hugging Face's `Trainer`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.timing import DisagreementError, Timing, time_in_turn
from benchmarks.trainer import PlainPeft, is_installed, padded, rows_of, trainer_job
from hafl_app.lowrank.factors import Adapter, LoraFactors, initial_adapter
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.training.base_model import load_base
from hafl_app.training.classifier import ClassifierSpec, LoraClassifier
from hafl_app.training.device import peak_memory_mb, reset_peak_memory
from hafl_app.training.local import train
from hafl_app.training.lora_model import LoraModel, LoraSpec
from hafl_app.training.settings import BaseSpec, TrainOptions

TOLERANCE = 1e-5  # of the norm, in float32
NUM_LABELS = 77  # BANKING77
LONGEST = 48
OURS, TRAINER, TRAINER_PADDED = "ours", "PEFT + Trainer", "PEFT + Trainer, padded to the longest"
WAYS = (OURS, TRAINER, TRAINER_PADDED)
_SEED = 1


@dataclass(frozen=True)
class Case:
    """Components of every module: how many are there, and how many of them are trained."""

    held: int
    trained: int

    @property
    def name(self) -> str:
        """Name of the case, such as ``rank 8``, or ``64, of which 2 trained``."""
        frozen = self.trained < self.held
        return f"{self.held}, of which {self.trained} trained" if frozen else f"rank {self.held}"

    def plan(self, model: LoraModel) -> TrainPlan:
        """Return the same plan for all of a model's layers."""
        module = ModulePlan(tuple(range(self.held)), tuple(range(self.trained)))
        return TrainPlan(dict.fromkeys(model.layers, module))

    def adapter(self, model: LoraModel) -> Adapter:
        """Return factors of which no part is zero, so that every gradient counts."""
        generator = torch.Generator().manual_seed(_SEED)

        def filled(factors: LoraFactors) -> LoraFactors:
            lora_B = torch.randn(factors.lora_B.shape, generator=generator)
            return LoraFactors(factors.lora_A, 0.02 * lora_B)

        whole = initial_adapter(model.shapes(), self.held, _SEED).map(filled)
        return whole.with_head(model.initial_head)


@dataclass(frozen=True)
class Texts:
    """Texts of random tokens, as `hafl_app.training.batches.Examples` describes them."""

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]


def banking_lengths(number: int) -> NDArray[np.int64]:
    """Draw lengths as BANKING77's in MiniLM's tokens: median 13, mean 15, cut to 48."""
    rng = np.random.default_rng(_SEED)
    return np.clip(np.rint(rng.lognormal(np.log(13), 0.55, number)), 4, LONGEST).astype(np.int64)


def random_texts(lengths: NDArray[np.int64], vocabulary: int) -> Texts:
    """Return texts of these lengths in tokens, with labels in [0, 77)."""
    rng = np.random.default_rng(_SEED)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(1, vocabulary, offsets[-1]).astype(np.int32)
    return Texts(tokens, offsets, rng.integers(0, NUM_LABELS, len(lengths)))


@dataclass(frozen=True)
class Client:
    """Client of every way: the base model in memory, texts, and the options of training."""

    spec: LoraSpec
    model: LoraModel
    texts: Any
    options: TrainOptions

    @property
    def steps(self) -> int:
        """Steps of one pass over the texts."""
        return -(-len(self.texts.labels) // self.options.batch_size)


def make_client(
    folder: Path | None,
    steps: int,
    options: TrainOptions,
    device: str = "cpu",
    **base_settings: Any,
) -> Client:
    """Return a classifier of BANKING77's classes and texts of its lengths.

    Parameters
    ----------
    folder
        A base model in Hugging Face's format; None is the built-in random one.
    base_settings
        Other fields of the base model's `BaseSpec`.

    Raises
    ------
    hafl_app.training.locate.ModelError
        If the folder has no model.
    """
    base = BaseSpec(str(folder or ""), random_weights=folder is None, **base_settings)
    model = LoraClassifier(spec := ClassifierSpec(base, NUM_LABELS)).to(device)
    texts = random_texts(
        banking_lengths(steps * options.batch_size), int(model.base.config.vocab_size)
    )
    return Client(spec, model, texts, options)


def plain_peft(client: Client, case: Case) -> PlainPeft:
    """Return an equal base model with equal factors in PEFT alone."""
    device = client.model.device
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(client.spec.seed)
        base = load_base(client.spec.base, client.spec.num_labels)
    adapter, head = case.adapter(client.model), None
    if adapter.head:
        out_features, in_features = adapter.head["weight"].shape
        head = nn.Linear(in_features, out_features)
        head.load_state_dict(dict(adapter.head))
    return PlainPeft(base, head, adapter, case.plan(client.model)).to(device)


def job(client: Client, case: Case, way: str) -> Callable[[], object]:
    """Return a local training, from the adapter that arrives to the one that leaves."""
    if way == OURS:
        adapter, plan = case.adapter(client.model), case.plan(client.model)
        return lambda: train(client.model, adapter, plan, client.texts, client.options, _SEED)
    rows = rows_of(client.model, client.texts)
    longest = LONGEST if way == TRAINER_PADDED else None
    return trainer_job(plain_peft(client, case), rows, client.options, longest)


def available(ways: Sequence[str]) -> list[str]:
    """Return the installed ones of these ways."""
    return [way for way in ways if way == OURS or is_installed()]


def measure(client: Client, case: Case, ways: Sequence[str], repeats: int) -> dict[str, Timing]:
    """Check that the ways have the same gradients, then time their steps in turn.

    On the CPU, CPU time is counted, which others on the machine disturb least; use one thread.

    Returns
    -------
    dict of str to Timing
        Seconds per step, of a whole training divided by its steps.

    Raises
    ------
    DisagreementError
        If loss or gradients of a batch differ by more than 1e-5 of the norm.
    """
    check_agreement(client, case)
    jobs = {way: job(client, case, way) for way in available(ways)}
    on_cpu = client.model.device.type == "cpu"
    clock = time.process_time if on_cpu else synchronized_clock
    timings = time_in_turn(jobs, repeats, clock=clock, patience_s=60.0)
    return {
        way: Timing(tuple(seconds / client.steps for seconds in timing.seconds))
        for way, timing in timings.items()
    }


def synchronized_clock() -> float:
    """Return the time in seconds, with everything done that the GPU was asked for."""
    torch.cuda.synchronize()
    return time.perf_counter()


def check_agreement(client: Client, case: Case) -> None:
    """Compare loss and gradients on a batch in float32, without dropout.

    Raises
    ------
    DisagreementError
        If they differ by more than 1e-5 of the norm.
    """
    model, rows = client.model, np.arange(min(4, len(client.texts.labels)))
    model.load(case.adapter(model), case.plan(model))
    with model.eval().computing("fp32"):
        loss = model.loss(model.batch(client.texts, rows))
    ours = gradients_of(loss, list(model.trainable_factors().values()))
    peer = plain_peft(client, case).eval()
    few = [row for row, _ in zip(rows_of(model, client.texts), rows, strict=False)]
    for longest in (None, LONGEST):
        inputs = {k: v.to(model.device) for k, v in padded(few, longest).items()}
        theirs = gradients_of(peer(**inputs)["loss"], peer.factors())
        for what, mine, other in zip(("loss", "gradients"), ours, theirs, strict=True):
            error = float((mine - other).norm() / mine.norm())
            if not error <= TOLERANCE:
                raise DisagreementError(
                    f"{case.name}: the {what} of plain PEFT differ by {error:.2g} of the norm, "
                    f"expected at most {TOLERANCE:g}"
                )


def gradients_of(loss: Tensor, factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the loss, and all gradients end to end, in float64."""
    gradients = torch.autograd.grad(loss, [tensor for pair in factors for tensor in pair])
    return loss.detach().double(), torch.cat([g.double().flatten() for g in gradients])


def memory_growth_mb(client: Client, case: Case, way: str) -> tuple[float, float]:
    """Train once; return MB before, and at the peak; on the CPU to be asked in a new process.

    On the CPU these are the process's own with everything loaded, on CUDA the tensors'.
    """
    work, device = job(client, case, way), client.model.device
    before = memory_mb(device)
    reset_peak_memory(device)
    work()
    return before, peak_memory_mb(device)


def memory_mb(device: torch.device) -> float:
    """Return the memory of tensors on CUDA, else of this process, in MB of 10^6 bytes."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e6
    return float(psutil.Process().memory_info().rss) / 1e6
