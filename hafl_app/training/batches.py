"""Rows to batches of similar length, token ids padded, and to parts where memory is short."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_BATCHES_PER_BUCKET = 16  # texts are sorted by length inside buckets of this many batches

# Errors of torch in a plain RuntimeError: its CPU allocator (c10/core/impl/alloc_cpu.cpp, on Linux
# and Windows), cuBLAS, which allocates by itself, and oneDNN, when it finds no room for its code.
_OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED"
    r"|could not create a primitive(?! descriptor)"
)


class Examples(Protocol):
    """Labeled rows, of text with `TextExamples.tokens`, of images with `ImageExamples.pixels`."""

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Start of each row's tokens, and their number: shape ``(rows + 1,)``.

        Images have no tokens, so all are 0: every row is as long as any other.
        """

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of each row: shape ``(rows,)``."""


@runtime_checkable
class TextExamples(Examples, Protocol):
    """Labeled token sequences stored end to end.

    Row ``i`` is ``tokens[offsets[i]:offsets[i + 1]]`` with label ``labels[i]``.
    """

    @property
    def tokens(self) -> NDArray[np.int32]:
        """All token ids, one row after another."""


@runtime_checkable
class ImageExamples(Examples, Protocol):
    """Labeled images of one size."""

    @property
    def pixels(self) -> NDArray[np.float32]:
        """All images: shape ``(rows, channels, height, width)``."""


@dataclass(frozen=True)
class Batch:
    """Padded rows: ``input_ids`` and ``attention_mask`` (rows, length), ``labels`` (rows,)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Tensors that the model reads, in the order of its arguments."""
        return self.input_ids, self.attention_mask


@dataclass(frozen=True)
class ImageBatch:
    """Images: ``pixel_values`` (rows, channels, height, width), ``labels`` (rows,)."""

    pixel_values: Tensor
    labels: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Tensors that the model reads."""
        return (self.pixel_values,)


def make_batch(examples: Examples, rows: NDArray[np.int64], device: torch.device) -> Batch:
    """Pad ``rows`` of ``examples`` to the longest among them.

    Raises
    ------
    TypeError
        If the examples are no text.
    """
    if not isinstance(examples, TextExamples):
        raise TypeError(f"the model reads text, {type(examples).__name__} has no tokens")
    starts, ends = examples.offsets[rows], examples.offsets[rows + 1]
    lengths = ends - starts
    input_ids = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        input_ids[row, : end - start] = examples.tokens[start:end]
    mask = (np.arange(input_ids.shape[1]) < lengths[:, None]).astype(np.int64)
    return Batch(
        *(torch.from_numpy(a).to(device) for a in (input_ids, mask, examples.labels[rows]))
    )


def joined(batches: Sequence[Batch | ImageBatch], label: int) -> Batch | ImageBatch:
    """Return the rows of several batches of one kind in one, padded to the longest.

    Parameters
    ----------
    label
        Of padded places, where every token has a label.
    """
    labels = torch.cat(_padded([batch.labels for batch in batches], label))
    columns = zip(*(batch.inputs for batch in batches), strict=True)
    inputs = [torch.cat(_padded(column, 0)) for column in columns]
    if len(inputs) == 1:
        return ImageBatch(inputs[0], labels)
    input_ids, attention_mask = inputs
    return Batch(input_ids, attention_mask, labels)


def _padded(tensors: Sequence[Tensor], value: int) -> list[Tensor]:
    """Pad tensors ``(rows, length)`` to the same length; others are of one shape already."""
    if tensors[0].ndim != 2:
        return list(tensors)
    longest = max(t.shape[1] for t in tensors)
    return [nn.functional.pad(t, (0, longest - t.shape[1]), value=value) for t in tensors]


def training_batches(
    examples: Examples, batch_size: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of one epoch's batches: shuffled, and of similar length inside a batch.

    Every row comes once. Sorting by length inside large shuffled buckets saves padding.
    """
    lengths = np.diff(examples.offsets)
    order = rng.permutation(len(examples.labels))
    batches: list[NDArray[Any]] = []
    bucket = batch_size * _BATCHES_PER_BUCKET
    for start in range(0, len(order), bucket):
        rows = _by_length(order[start : start + bucket], lengths)
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    for index in rng.permutation(len(batches)):
        yield batches[index]


def gathered(
    batches: Iterable[NDArray[np.int64]],
    examples: Examples,
    num_targets: Callable[[NDArray[np.int64]], int],
    least: int,
) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of several batches in one, until it has so many targets; the last has fewer.

    They are sorted by length: in parts that go through the model at once they need little padding.

    Parameters
    ----------
    num_targets
        Counts what rows have for the loss to count.
    """
    lengths = np.diff(examples.offsets)
    found: list[NDArray[np.int64]] = []
    targets = 0
    for rows in batches:
        found.append(rows)
        targets += num_targets(rows)
        if targets >= least:
            yield _by_length(np.concatenate(found), lengths)
            found, targets = [], 0
    if found:
        yield _by_length(np.concatenate(found), lengths)


def _by_length(rows: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    order: NDArray[np.int64] = rows[np.argsort(lengths[rows], kind="stable")]
    return order


def evaluation_batches(
    examples: Examples, batch_size: int, most_padding: float = math.inf
) -> Iterator[NDArray[np.int64]]:
    """Yield all rows in batches, sorted by length.

    Parameters
    ----------
    batch_size
        Most rows of a batch.
    most_padding
        Tokens of padding that one more row may cost the rows before it; a longer one begins the
        next batch.
    """
    lengths = np.diff(examples.offsets)
    order = np.argsort(lengths, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        size = end - start
        if size < batch_size and end < len(order):
            longer = int(lengths[order[end]] - lengths[order[end - 1]])
            if size * longer <= most_padding:
                continue
        yield order[start:end]
        start = end


class MicroBatches:
    """Number of texts at once in the model: a whole batch, until memory is short.

    Parameters
    ----------
    size
        Texts at once to begin with, at least 1; afterwards what was found to fit.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def split(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return a batch's rows in parts of at most ``size``, in their order."""
        return [rows[i : i + self.size] for i in range(0, len(rows), self.size)]

    def halve(self, rows: int) -> bool:
        """Halve the parts that a batch of ``rows`` came in; False if they held one text each."""
        largest = min(self.size, rows)
        self.size = (largest + 1) // 2
        return largest > 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory does not suffice, on the device or the host.

    On a Linux host that overcommits memory there may be no error: the kernel ends the process.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
