"""Ways to compute the gradients of a batch of answers: padded, and without any padding."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from benchmarks.timing import DisagreementError, Timing, time_in_turn
from hafl_app.training.batches import Batch, Examples, training_batches
from hafl_app.training.causal import IGNORED, LoraCausalLM

TOLERANCE: Final = {"fp32": 1e-4, "bf16": 5e-2}  # of the norm of all gradients
PADDED: Final = "padded"
Way = Callable[[LoraCausalLM, Sequence[Batch]], Iterator[Tensor]]
"""Yields losses that add up to the mean over all targets: of the batch, and of each of its rows."""


def padding(examples: Examples, batches: Sequence[NDArray[np.int64]]) -> float:
    """Return the padding of batches over their tokens."""
    lengths = np.diff(examples.offsets)
    padded = sum(len(rows) * lengths[rows].max() for rows in batches)
    return float(padded / lengths[np.concatenate(batches)].sum() - 1)


def batches_of(
    examples: Examples, size: int, number: int, seed: int
) -> tuple[list[NDArray[np.int64]], float, float]:
    """Return some whole batches from short rows to long ones, and the padding of an epoch.

    Returns
    -------
    tuple
        The batches; padding of batches of similar length, as in training, and of shuffled ones.
    """
    rng, lengths = np.random.default_rng(seed), np.diff(examples.offsets)
    ours = list(training_batches(examples, size, rng))
    shuffled = np.split(rng.permutation(len(lengths)), range(size, len(lengths), size))
    whole = sorted((rows for rows in ours if len(rows) == size), key=lambda r: lengths[r].sum())
    places = np.linspace(0, len(whole) - 1, number).round().astype(int)
    return [whole[i] for i in places], padding(examples, ours), padding(examples, shuffled)


def measure(
    model: LoraCausalLM, examples: Examples, rows: NDArray[np.int64], precision: str, repeats: int
) -> dict[str, Timing]:
    """Time all ways in turn on one batch, in CPU seconds.

    Raises
    ------
    DisagreementError
        If one has other gradients than the padded batch.
    """
    parts = [model.batch(examples, some) for some in (rows, *rows[:, None])]
    jobs = {name: partial(gradients, model, parts, way, precision) for name, way in WAYS.items()}
    expected = jobs[PADDED]()
    for name, job in jobs.items():
        error = float((job() - expected).norm() / expected.norm())
        if not error <= TOLERANCE[precision]:
            raise DisagreementError(f"{name}: the gradients differ by {error:.1e}")
    return time_in_turn(jobs, repeats, clock=time.process_time)


def gradients(model: LoraCausalLM, parts: Sequence[Batch], way: Way, precision: str) -> Tensor:
    """Return all gradients of a batch, as one vector."""
    model.clear_gradients()
    with model.computing(precision):
        for loss in way(model, parts):
            loss.backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def padded(model: LoraCausalLM, parts: Sequence[Batch]) -> Iterator[Tensor]:
    """Yield the loss of the padded batch."""
    yield model.loss(parts[0])


def row_by_row(model: LoraCausalLM, parts: Sequence[Batch]) -> Iterator[Tensor]:
    """Yield the share of every row in the loss."""
    targets = [int((part.labels[:, 1:] != IGNORED).sum()) for part in parts[1:]]
    for part, count in zip(parts[1:], targets, strict=True):
        yield model.loss(part) * (count / sum(targets))


def logits_where_any_counts(model: LoraCausalLM, parts: Sequence[Batch]) -> Iterator[Tensor]:
    """Yield the loss of the padded batch, from logits of the columns in which any row counts."""
    labels = parts[0].labels[:, 1:]
    columns = torch.nonzero((labels != IGNORED).any(0)).flatten()
    ids, mask = parts[0].inputs
    logits = model.base(input_ids=ids, attention_mask=mask, logits_to_keep=columns).logits
    yield _mean_loss(logits, labels[:, columns])


def packed_under_a_mask(model: LoraCausalLM, parts: Sequence[Batch]) -> Iterator[Tensor]:
    """Yield the loss of all rows in one, which a mask keeps from reading each other."""
    lengths = [part.input_ids.shape[1] for part in parts[1:]]
    blocks = [torch.ones(length, length).tril() for length in lengths]
    mask: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    yield _packed(model, parts[1:], mask.bool()[None, None])


def packed_with_own_attention(model: LoraCausalLM, parts: Sequence[Batch]) -> Iterator[Tensor]:
    """Yield the loss of all rows in one, whose attention is computed for each row by itself."""
    with _attention_by_row(model, parts[1:]):
        yield _packed(model, parts[1:])


def packed_and_logits_where_they_count(
    model: LoraCausalLM, parts: Sequence[Batch]
) -> Iterator[Tensor]:
    """Yield the loss of `packed_with_own_attention`, from logits of the answers alone."""
    with _attention_by_row(model, parts[1:]):
        yield _packed(model, parts[1:], counted=True)


def _packed(
    model: LoraCausalLM, rows: Sequence[Batch], mask: Tensor | None = None, counted: bool = False
) -> Tensor:
    places = torch.cat([torch.arange(row.input_ids.shape[1]) for row in rows])
    given: dict[str, Any] = {"attention_mask": mask, "position_ids": places[None]}
    # What follows a row's last token is another row, and no target.
    next_ones = [functional.pad(row.labels[:, 1:], (0, 1), value=IGNORED) for row in rows]
    labels = torch.cat(next_ones, 1)
    if counted:
        given["logits_to_keep"] = columns = torch.nonzero(labels[0] != IGNORED).flatten()
        labels = labels[:, columns]
    ids = torch.cat([row.input_ids for row in rows], 1)
    return _mean_loss(model.base(input_ids=ids, **given).logits, labels)


def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


@contextmanager
def _attention_by_row(model: LoraCausalLM, rows: Sequence[Batch]) -> Iterator[None]:
    """Let the base compute the attention of packed rows one row at a time."""
    ends = list(accumulate(row.input_ids.shape[1] for row in rows))
    cuts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **named: Any
    ) -> tuple[Tensor, None]:
        del module, mask
        found = [
            functional.scaled_dot_product_attention(
                query[:, :, cut],
                key[:, :, cut],
                value[:, :, cut],
                is_causal=True,
                scale=named["scaling"],
                enable_gqa=True,
            )
            for cut in cuts
        ]
        return torch.cat(found, 2).transpose(1, 2).contiguous(), None

    before = model.base.config._attn_implementation
    AttentionInterface.register("row_by_row", attention)
    model.base.set_attn_implementation("row_by_row")
    try:
        yield
    finally:
        model.base.set_attn_implementation(before)


WAYS: Final[Mapping[str, Way]] = {
    PADDED: padded,
    "one row at a time": row_by_row,
    "packed, kept apart by a mask": packed_under_a_mask,
    "packed, attention row by row": packed_with_own_attention,
    "padded, logits where any row counts": logits_where_any_counts,
    "packed, row by row, logits where they count": packed_and_logits_where_they_count,
}
