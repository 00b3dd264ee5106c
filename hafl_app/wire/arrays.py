"""Arrays, bytes and lists of sizes in Flower records: written, and read from untrusted senders.

Reading goes by the data, never by the claims of a header; anything else is a `RecordError`. Arrays
of float32 share the message's memory and are read-only.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any, TypeVar, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord
from numpy.lib.format import write_array_header_1_0
from numpy.typing import NDArray

from hafl_app.plan_parts.number_formats import NumberFormat
from hafl_app.wire.compression import CompressedTextError, compress, decompress

DTYPES: Mapping[NumberFormat, str] = {"fp32": "float32", "bf16": "uint16", "int8": "int8"}
"""NumPy dtype of each format's numbers; of bfloat16, which NumPy lacks, the bits."""
_NPY, _NPY_MAGIC, _NPY_HEADER_START = "numpy.ndarray", b"\x93NUMPY\x01\x00", 10
SPARSE = "sparse"  # a bit for each number that there is, then the float32 that are not 0
_RAW = "raw"  # numbers without a header: an npy header is long beside 8-bit numbers
_LARGEST_SIZE = 2**31 - 1  # of one side of a matrix
_KEPT_TEXT = 2**16  # characters; hundreds of modules have less
_MOST_TEXT = 4 * 2**20  # bytes of a layout or a plan; ten thousand modules have less

Float32 = NDArray[np.float32]
Numbers = NDArray[Any]  # of one of `DTYPES`
T = TypeVar("T")


class RecordError(ValueError):
    """A message whose content is not what the codec writes."""


def joined(parts: Iterable[Numbers], dtype: str) -> Numbers:
    """Return the numbers of these arrays as one flat array."""
    # The empty part gives no parts a dtype, too.
    return np.concatenate([np.zeros(0, dtype), *(part.ravel() for part in parts)], dtype=dtype)


def write_numbers(parts: Iterable[Numbers], dtype: str) -> Array:
    """Write the numbers of these arrays in a row: float32 as npy, the others without a header.

    Each number is copied once.
    """
    pieces = [np.ascontiguousarray(part, dtype) for part in parts]
    shape, data = (sum(piece.size for piece in pieces),), [piece.data for piece in pieces]
    if dtype != DTYPES["fp32"]:
        return Array(dtype, shape, _RAW, b"".join(data))
    return Array(dtype, shape, _NPY, b"".join([_npy_header(shape), *data]))


def write_sparse(parts: Iterable[Numbers]) -> Array:
    """Write which numbers of these arrays in a row are not 0, and these in float32."""
    flat = joined(parts, DTYPES["fp32"])
    there = flat != 0
    data = np.packbits(there).tobytes() + flat[there].tobytes()
    return Array("uint8", (len(data),), SPARSE, data)


def read_sparse(arrays: ArrayRecord, key: str, count: int) -> Float32:
    """Read ``count`` numbers of `write_sparse`, those that are 0 too.

    Raises
    ------
    RecordError
        If the array is of another length, or says of a number beyond the last that it is there.
    """
    data, mask_bytes = arrays[key].data, -(-count // 8)
    if len(data) < mask_bytes:  # before anything as long as `count` is made
        raise RecordError(f"arrays: {key!r} has {len(data)} bytes, too few for {count} numbers")
    bits = np.unpackbits(np.frombuffer(data, np.uint8, mask_bytes))
    there = bits[:count].astype(bool)
    expected = mask_bytes + 4 * int(there.sum())
    if len(data) != expected or bits[count:].any():
        raise RecordError(f"arrays: {key!r} has {len(data)} bytes, its mask says {expected}")
    flat = np.zeros(count, np.float32)
    flat[there] = np.frombuffer(data, np.float32, offset=mask_bytes)
    return flat


@lru_cache(maxsize=64)
def _npy_header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    facts = {"descr": "<f4", "fortran_order": False, "shape": shape}
    write_array_header_1_0(header, facts)
    return header.getvalue()


def read_numbers(arrays: ArrayRecord, key: str) -> tuple[NumberFormat, Numbers]:
    """Read the format and the numbers of an array from `write_numbers`.

    Raises
    ------
    RecordError
        If the array is missing, or of another kind.
    """
    array = arrays.get(key)
    if array is None or array.stype != _RAW:
        return "fp32", read_npy(arrays, key)
    formats: dict[str, NumberFormat] = {DTYPES[name]: name for name in ("bf16", "int8")}
    if array.dtype not in formats:
        raise RecordError(
            f"arrays: {key!r} has dtype {array.dtype!r} as {_RAW!r}, expected uint16 or int8"
        )
    size = np.dtype(array.dtype).itemsize
    if len(array.data) % size or array.shape != (len(array.data) // size,):
        raise RecordError(
            f"arrays: {key!r} cannot be read: {len(array.data)} bytes for shape {array.shape} of "
            f"{array.dtype}"
        )
    return formats[array.dtype], np.frombuffer(bytearray(array.data), array.dtype)


def read_npy(arrays: ArrayRecord, key: str) -> Float32:
    """Read an array of float32 in npy format.

    Raises
    ------
    RecordError
        If the array is missing, or of another kind.
    """
    if key not in arrays:
        raise RecordError(f"arrays: {key!r} is missing; there are {sorted(arrays)[:5]}")
    array = arrays[key]
    if array.dtype != "float32" or array.stype != _NPY:
        raise RecordError(
            f"arrays: {key!r} has dtype {array.dtype!r} as {array.stype!r}, expected float32 as npy"
        )
    try:
        return _read_npy(array)
    except (ValueError, OverflowError) as error:
        raise RecordError(f"arrays: {key!r} cannot be read: {error}") from error


def _read_npy(array: Array) -> Float32:
    """Read npy bytes that have the one header that belongs to the array's declared shape.

    ``numpy.load`` is not used: it parses any header, allocates the claimed
    size before it looks for the data, and raises half a dozen other kinds of error.
    """
    start = _NPY_HEADER_START + int.from_bytes(array.data[8:_NPY_HEADER_START], "little")
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {array.shape}, }}".encode()
    padded = header.ljust(start - _NPY_HEADER_START - 1) + b"\n"
    if array.data[:8] != _NPY_MAGIC or array.data[_NPY_HEADER_START:start] != padded:
        raise ValueError(f"not npy bytes of float32 in shape {array.shape}")
    count, num_bytes = prod(array.shape), len(array.data) - start
    if num_bytes != 4 * count:
        raise ValueError(f"{num_bytes} bytes of numbers, shape {array.shape} has {4 * count}")
    return np.frombuffer(array.data, np.float32, count, start).reshape(array.shape)


def write_text(values: object) -> bytes:
    """Write plain JSON values in few bytes."""
    return compress(json.dumps(values, separators=(",", ":")))


def read_text(record: ConfigRecord, key: str) -> str:
    """Read compressed text; of a compression bomb at most 4 MiB is expanded.

    Raises
    ------
    RecordError
        If there is none, or it is damaged or too long.
    """
    try:
        return decompress(_bytes(record, key), _MOST_TEXT)
    except CompressedTextError as error:
        raise RecordError(str(error)) from error


def read_layout(record: ConfigRecord, key: str) -> Mapping[str, Any]:
    """Read a JSON object that `write_text` wrote.

    Raises
    ------
    RecordError
        If there is none, or it is damaged or too long.
    """
    text = read_text(record, key)
    try:
        layout = _parsed(text) if len(text) <= _KEPT_TEXT else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{key}: {error}") from error
    if not isinstance(layout, dict):
        raise RecordError(f"{key}: {type(layout).__name__}, expected an object of lists")
    return layout


@lru_cache(maxsize=64)
def _parsed(text: str) -> Any:
    """Parse a layout, cached: the clients of a round send few different ones."""
    return json.loads(text)


def read_parts(record: ConfigRecord, key: str, dtype: str, counts: Sequence[int]) -> list[Numbers]:
    """Read bytes as consecutive arrays, each of its count of numbers.

    Raises
    ------
    RecordError
        If they are missing, or not as many.
    """
    data, size = _bytes(record, key), np.dtype(dtype).itemsize
    if len(data) != size * sum(counts):
        raise RecordError(f"layout: {key!r} has {len(data)} bytes, expected {size * sum(counts)}")
    flat = np.frombuffer(bytearray(data), dtype)
    ends = np.cumsum(counts, dtype=np.int64)
    return [flat[end - count : end] for count, end in zip(counts, ends, strict=True)]


def _bytes(record: ConfigRecord, key: str) -> bytes:
    value = record.get(key)
    if not isinstance(value, bytes):
        raise RecordError(f"{key!r} is missing or no bytes")
    return value


def read_names(layout: Mapping[str, Any], key: str) -> list[str]:
    """Read a list of distinct names.

    Raises
    ------
    RecordError
        If it is missing or malformed.
    """
    names = _list(layout, key, str, "text")
    if len(names) != len(set(names)):
        raise RecordError(f"layout: {key!r} has repeated names")
    return names


def read_sizes(layout: Mapping[str, Any], key: str, count: int) -> list[int]:
    """Read a list of ``count`` sizes of matrices.

    Raises
    ------
    RecordError
        If it is missing or malformed.
    """
    sizes = _one_a_module(layout, key, int, "whole numbers", count)
    if odd := [size for size in sizes if not 0 <= size <= _LARGEST_SIZE]:
        raise RecordError(f"layout: {key!r} has {odd[0]}, expected 0 to {_LARGEST_SIZE}")
    return sizes


def read_texts(layout: Mapping[str, Any], key: str, count: int) -> list[str]:
    """Read a list of ``count`` texts.

    Raises
    ------
    RecordError
        If it is missing or malformed.
    """
    return _one_a_module(layout, key, str, "text", count)


def _one_a_module(
    layout: Mapping[str, Any], key: str, kind: type[T], expected: str, count: int
) -> list[T]:
    values = _list(layout, key, kind, expected)
    if len(values) != count:
        raise RecordError(f"layout: {key!r} has {len(values)} values for {count} modules")
    return values


def _list(layout: Mapping[str, Any], key: str, kind: type[T], expected: str) -> list[T]:
    values = layout.get(key)
    # The exact type: True would count as the number 1.
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise RecordError(f"layout: {key!r} is missing or not a list of {expected}")
    return cast(list[T], values)
