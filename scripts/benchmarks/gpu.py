"""A training step of a Llama-shaped model on a device, beside plain PEFT and the device's limit.

Needs torch, transformers and peft, and of this package `lowrank`, `plan` and `training` alone.
"""

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import aggregation, cohort
from benchmarks.timing import Timing
from benchmarks.training import (
    OURS,
    TRAINER,
    Case,
    Client,
    available,
    check_agreement,
    job,
    memory_mb,
)
from hafl_app.training.base_model import CAUSAL_LM
from hafl_app.training.batches import is_out_of_memory
from hafl_app.training.causal import CausalSpec
from hafl_app.training.device import peak_memory_mb, reset_peak_memory
from hafl_app.training.settings import BaseSpec, TrainOptions
from hafl_app.training.task import DeviceMemoryError

NOT_MEASURED = "not measured"
OUT_OF_MEMORY = "out of memory"
TINY_LLAMA: Mapping[str, Any] = {  # TinyLlama-1.1B
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
SMOKE: Mapping[str, Any] = {  # the same in small
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
WAYS = (OURS, TRAINER)
FIGURES = ("ms a step", "tokens/s", "peak MB", "of the matmul limit")
CLIENTS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)  # ranks, for the aggregation


@dataclass(frozen=True)
class Load:
    """Texts that go through the model in a step.

    Parameters
    ----------
    rank
        Of every module, all of it trained.
    batch_size, length
        Rows, and tokens of each.
    """

    rank: int
    batch_size: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.length


@dataclass(frozen=True)
class Answers:
    """Rows of random tokens of one length, all but the first of which are to be predicted."""

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]


def random_answers(rows: int, length: int, vocabulary: int, seed: int = 0) -> Answers:
    """Return so many rows of ``length`` tokens each."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, vocabulary, rows * length).astype(np.int32)
    offsets = np.arange(rows + 1, dtype=np.int64) * length
    counts = np.arange(rows * length) % length > 0
    return Answers(tokens, offsets, np.zeros(rows, np.int64), counts)


def make_client(shape: Mapping[str, Any], device: torch.device) -> Client:
    """Return a model of random weights, made on the device, with nothing to train on yet."""
    base = BaseSpec("", random_weights=True, task=CAUSAL_LM, shape=dict(shape))
    spec = CausalSpec(base)
    with device:
        model = spec.build()
    options = TrainOptions(precision="bf16" if device.type == "cuda" else "fp32")
    return Client(spec, model, None, options)


def with_texts(client: Client, load: Load, steps: int) -> Client:
    """Return the client with rows for so many steps."""
    vocabulary = int(client.model.base.config.vocab_size)
    rows = random_answers(steps * load.batch_size, load.length, vocabulary)
    return replace(client, texts=rows, options=replace(client.options, batch_size=load.batch_size))


def check(shape: Mapping[str, Any], device: torch.device, ranks: Sequence[int]) -> None:
    """Check that all ways have the same gradients, in float32 on the first two layers.

    Raises
    ------
    benchmarks.timing.DisagreementError
        If they differ by more than 1e-5 of the norm.
    """
    client = make_client({**shape, "num_hidden_layers": 2}, device)
    client = with_texts(client, Load(max(ranks), 4, 16), 1)
    for rank in ranks:
        check_agreement(client, Case(rank, rank))


def flops(client: Client, load: Load) -> float:
    """Return the operations of a step that no way can avoid, as a multiply and an add each.

    Frozen weights are read forward and for the gradient of their inputs: ``4 N`` a token, and the
    factors for their own gradient as well: ``6 N``. To these comes attention's product with keys
    and values, causal, forward and twice as much backward. Embeddings are looked up.
    """
    config, layers = client.model.base.config, client.model.shapes().values()
    frozen = sum(s.in_features * s.out_features for s in layers)
    frozen += config.vocab_size * config.hidden_size  # the logits
    trained = load.rank * sum(s.in_features + s.out_features for s in layers)
    # Two products, each of which half the tokens take part in, and three times as much in all.
    attention = 3 * 2 * load.length * config.num_hidden_layers * config.hidden_size
    return float(load.tokens * (4 * frozen + 6 * trained + attention))


def peak_flops(device: torch.device, size: int, repeats: int = 20) -> float:
    """Return operations per second of the device's products of square matrices, in bf16 on CUDA."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in "lr")
    seconds = []
    for turn in range(repeats + 3):
        started = clock(device)
        left @ right
        if turn >= 3:  # after warming up
            seconds.append(clock(device) - started)
    return 2 * size**3 / statistics.median(seconds)


def clock(device: torch.device) -> float:
    """Return the time in seconds, with everything done that the device was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Step:
    """Time of a step, and on CUDA the peak of its tensors, or the reason why there is none."""

    timing: Timing | None
    peak_mb: float | None = None
    missing: str = ""


def measure(client: Client, load: Load, *, steps: int, repeats: int) -> dict[str, Step]:
    """Time trainings of ``steps`` steps, one way after the other.

    Returns
    -------
    dict of str to Step
        Of `WAYS`. The peak counts the way's own model alone.
    """
    client, case = with_texts(client, load, steps), Case(load.rank, load.rank)
    results = {way: Step(None, missing="not installed") for way in WAYS}
    for way in available(WAYS):
        release(client.model.device)
        try:
            results[way] = _measure_way(client, case, way, repeats)
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, DeviceMemoryError) or is_out_of_memory(error)):
                raise
            results[way] = Step(None, missing=OUT_OF_MEMORY)
    release(client.model.device)
    return results


def _measure_way(client: Client, case: Case, way: str, repeats: int) -> Step:
    device = client.model.device
    # Our model stays where it is beside the other's, whose own memory is measured.
    others = 0.0 if way == OURS else memory_mb(device)
    work = job(client, case, way)
    reset_peak_memory(device)
    seconds = []
    for turn in range(repeats + 1):
        started = clock(device)
        work()
        if turn:  # the first one warms up
            seconds.append((clock(device) - started) / client.steps)
    peak = peak_memory_mb(device) - others if device.type == "cuda" else None
    return Step(Timing(tuple(seconds)), peak)


def measure_cohorts(
    client: Client, load: Load, sizes: Sequence[int], *, steps: int, repeats: int
) -> dict[str, Timing]:
    """Time clients of ``steps`` steps one at a time, and in cohorts of these sizes.

    Returns
    -------
    dict of str to Timing
        See `benchmarks.cohort.measure`.

    Raises
    ------
    benchmarks.timing.DisagreementError
        If they are not trained the same together as alone.
    """
    vocabulary = int(client.model.base.config.vocab_size)
    rows = steps * load.batch_size
    texts = [random_answers(rows, load.length, vocabulary, seed) for seed in range(max(sizes))]
    client = replace(client, options=replace(client.options, batch_size=load.batch_size))
    tasks = cohort.tasks_of(client, texts, load.rank)
    cohort.check(client, tasks[:4])
    return cohort.measure(client, tasks, sizes, repeats)


def release(device: torch.device) -> None:
    """Release the memory that is in use no more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def row(load: Load, step: Step, way: str, limit: float, work: float) -> dict[str, object]:
    """Return a line of the table.

    Parameters
    ----------
    limit
        Operations per second of `peak_flops`.
    work
        Operations of a step, see `flops`.
    """
    cells: dict[str, object] = {
        "rank": load.rank,
        "batch x tokens": f"{load.batch_size} x {load.length}",
        "way": way,
    }
    if step.timing is None:
        return cells | dict.fromkeys(FIGURES, step.missing)
    seconds = step.timing.median
    figures = (
        str(step.timing),
        f"{load.tokens / seconds:.0f}",
        NOT_MEASURED if step.peak_mb is None else f"{step.peak_mb:.0f}",
        f"{work / seconds / limit:.0%}",
    )
    return cells | dict(zip(FIGURES, figures, strict=True))


def unmeasured(loads: Sequence[Load]) -> list[dict[str, object]]:
    """Return the table's lines where there is no device."""
    missing = Step(None, missing=NOT_MEASURED)
    return [row(load, missing, way, 1.0, 0.0) for load in loads for way in WAYS]


def aggregate(sizes: Sequence[int], device: torch.device, repeats: int) -> list[dict[str, object]]:
    """Time the server's aggregation of ten clients' products on the device.

    Raises
    ------
    benchmarks.timing.DisagreementError
        If the ways do not leave the same error.
    """
    rows: list[dict[str, object]] = []
    for size in sizes:
        case = aggregation.make_case(size, CLIENTS, device.type)
        timings = aggregation.measure(case, repeats, slow_peers=False)
        rows.append({"N": size} | {f"{way}, ms": str(t) for way, t in timings.items()})
    return rows
