"""Wire codec of what a closed-form head is solved from: sums of features, and losses.

Arrays travel without headers, of ``sum x x^T`` the upper triangle alone. What comes is read by the
sizes that were asked for, never by those that it claims.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from hafl_app.heads.feature_sums import FeatureSums, symmetric, triangle_size, upper_triangle
from hafl_app.wire.arrays import RecordError

SUMS: Final = "feature-sums"
_COUNTS, _BY_CLASS, _MOMENTS, _LOSSES = "class-counts", "class-sums", "moments", "losses"
_DTYPES: Final = {"fp32": "float32", "fp64": "float64"}
_COUNT_DTYPE, _RAW = "int64", "raw"


@dataclass(frozen=True)
class SumsFormat:
    """Sizes and numbers of the sums that are asked for.

    Parameters
    ----------
    width
        Features that are summed up, at least 1.
    num_classes
        Classes, at least 2.
    moments
        Whether ``sum x x^T`` is among them.
    numbers
        ``fp32`` or ``fp64``; counts are whole numbers.
    """

    width: int
    num_classes: int
    moments: bool
    numbers: str

    @property
    def payload_bytes(self) -> int:
        """Bytes of all arrays."""
        count = self.width * self.num_classes + self.moments * triangle_size(self.width)
        size = np.dtype(_DTYPES[self.numbers]).itemsize
        return size * count + np.dtype(_COUNT_DTYPE).itemsize * self.num_classes


def write_sums(sums: FeatureSums, numbers: str) -> ArrayRecord:
    """Write sums in ``fp32`` or ``fp64``."""
    dtype = _DTYPES[numbers]
    arrays = {
        _COUNTS: _write(sums.class_counts, _COUNT_DTYPE),
        _BY_CLASS: _write(sums.class_sums, dtype),
    }
    if sums.moments is not None:
        arrays[_MOMENTS] = _write(upper_triangle(sums.moments), dtype)
    return ArrayRecord(arrays)


def read_sums(content: RecordDict, asked: SumsFormat) -> FeatureSums:
    """Read the sums of a reply, in float64.

    Raises
    ------
    RecordError
        If there are none, or they are of another size or of other numbers than were asked for.
    """
    record, dtype = _record(content), _DTYPES[asked.numbers]
    expected = {_COUNTS, _BY_CLASS} | ({_MOMENTS} if asked.moments else set())
    if set(record) != expected:
        raise RecordError(f"{SUMS}: {sorted(record)[:5]}, expected {sorted(expected)}")
    counts = _read(record, _COUNTS, _COUNT_DTYPE, (asked.num_classes,))
    by_class = _read(record, _BY_CLASS, dtype, (asked.width, asked.num_classes))
    moments = None
    if asked.moments:
        flat = _read(record, _MOMENTS, dtype, (triangle_size(asked.width),))
        moments = symmetric(flat, asked.width)
    return FeatureSums(counts, by_class, moments)


def write_losses(losses: Tensor) -> ArrayRecord:
    """Write the summed losses at every temperature, in float64."""
    return ArrayRecord({_LOSSES: _write(losses, _DTYPES["fp64"])})


def read_losses(content: RecordDict, count: int) -> Tensor:
    """Read the losses at ``count`` temperatures.

    Raises
    ------
    RecordError
        If there are none, or not as many.
    """
    return _read(_record(content), _LOSSES, _DTYPES["fp64"], (count,))


def _record(content: RecordDict) -> ArrayRecord:
    record = content.get(SUMS)
    if not isinstance(record, ArrayRecord):
        raise RecordError(f"no {SUMS!r} in the message; it has {sorted(content)[:5]}")
    return record


def _write(tensor: Tensor, dtype: str) -> Array:
    data = np.ascontiguousarray(tensor.cpu().numpy(), dtype)
    return Array(dtype, data.shape, _RAW, data.tobytes())


def _read(record: ArrayRecord, key: str, dtype: str, shape: Sequence[int]) -> Tensor:
    array = record.get(key)
    size = np.dtype(dtype).itemsize * prod(shape)
    if (
        array is None
        or (array.dtype, array.stype, tuple(array.shape)) != (dtype, _RAW, tuple(shape))
        or len(array.data) != size
    ):
        got = "none" if array is None else f"{array.dtype} {tuple(array.shape)[:3]}"
        raise RecordError(f"{SUMS}: {key!r} is {got}, expected {dtype} {tuple(shape)}")
    flat = np.frombuffer(bytearray(array.data), dtype)
    return torch.from_numpy(flat).to(torch.float64).reshape(tuple(shape))
