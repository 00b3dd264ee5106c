"""Wire codec: adapters, plans and scores as Flower records. NumPy and bytes only.

All factors of a message travel in one flat array, so that small ranks do not pay for headers;
a layout record says how to cut it. Names on the wire are kebab-case and spelled only here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeVar, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from hafl_app.plan import TrainPlan

ARRAYS, LAYOUT, PLAN, METRICS, CONFIG = "arrays", "layout", "plan", "metrics", "config"
FACTORS, HEAD_PREFIX, IMPORTANCE = "factors", "head/", "importance"
_NPY, _NPY_MAGIC, _NPY_HEADER_START = "numpy.ndarray", b"\x93NUMPY\x01\x00", 10
_LARGEST_SIZE = 2**31 - 1  # of one side of a matrix
NUM_EXAMPLES, SERVER_ROUND = "num-examples", "server-round"
PARTITION_ID, LABEL_NAMES = "partition-id", "label-names"

Float32 = NDArray[np.float32]
T = TypeVar("T")


class RecordError(ValueError):
    """A message whose content is not what the codec writes."""


@dataclass(frozen=True)
class AdapterArrays:
    """An adapter as arrays.

    Parameters
    ----------
    modules
        Module name to ``(lora_A (rank, in_features), lora_B (out_features, rank))``, float32.
    head
        Parameter name to array.
    importance
        Module name to component scores, or empty.
    """

    modules: Mapping[str, tuple[Float32, Float32]]
    head: Mapping[str, Float32] = field(default_factory=dict)
    importance: Mapping[str, Float32] = field(default_factory=dict)


def pack(adapter: AdapterArrays) -> tuple[ArrayRecord, ConfigRecord]:
    """Write an adapter as ``(arrays, layout)``; values survive bit for bit."""
    pieces = [part.ravel() for pair in adapter.modules.values() for part in pair]
    flat = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    arrays = {FACTORS: Array(_float32(flat))}
    arrays |= {HEAD_PREFIX + name: Array(_float32(array)) for name, array in adapter.head.items()}
    if adapter.importance:
        scores = [adapter.importance[name] for name in adapter.importance]
        arrays[IMPORTANCE] = Array(_float32(np.concatenate(scores)))
    pairs = adapter.modules.values()
    layout = ConfigRecord(
        {
            "modules": list(adapter.modules),
            "ranks": [lora_A.shape[0] for lora_A, _ in pairs],
            "in-features": [lora_A.shape[1] for lora_A, _ in pairs],
            "out-features": [lora_B.shape[0] for _, lora_B in pairs],
            "scored-modules": list(adapter.importance),
            "num-scores": [len(scores) for scores in adapter.importance.values()],
        }
    )
    return ArrayRecord(arrays), layout


def unpack(arrays: ArrayRecord, layout: ConfigRecord) -> AdapterArrays:
    """Read what `pack` wrote.

    Raises
    ------
    RecordError
        If arrays and layout do not fit together, or are not of the codec's types.
    """
    names = _names(layout, "modules")
    ranks, widths, heights = (
        _sizes(layout, key, len(names)) for key in ("ranks", "in-features", "out-features")
    )
    expected = sum(r * (m + n) for r, m, n in zip(ranks, heights, widths, strict=True))
    flat, start, modules = _numpy(arrays, FACTORS), 0, {}
    if flat.shape != (expected,):
        raise RecordError(f"factors: {flat.shape} numbers, the layout says {expected}")
    for name, rank, height, width in zip(names, ranks, heights, widths, strict=True):
        middle, end = start + rank * width, start + rank * (width + height)
        modules[name] = (
            flat[start:middle].reshape(rank, width),
            flat[middle:end].reshape(height, rank),
        )
        start = end
    head = {
        key.removeprefix(HEAD_PREFIX): _numpy(arrays, key)
        for key in arrays
        if key.startswith(HEAD_PREFIX)
    }
    return AdapterArrays(modules, head, dict(_scores(arrays, layout)))


def _scores(arrays: ArrayRecord, layout: ConfigRecord) -> Iterator[tuple[str, Float32]]:
    names = _names(layout, "scored-modules")
    counts = _sizes(layout, "num-scores", len(names))
    if not names:
        return
    flat = _numpy(arrays, IMPORTANCE)
    if flat.shape != (sum(counts),):
        raise RecordError(f"importance: {flat.shape} numbers, the layout says {sum(counts)}")
    ends = np.cumsum(counts)
    for name, count, end in zip(names, counts, ends, strict=True):
        yield name, flat[end - count : end]


def _float32(array: NDArray[Any]) -> Float32:
    return np.ascontiguousarray(array, dtype=np.float32)


def _names(layout: ConfigRecord, key: str) -> list[str]:
    names = _list(layout, key, str, "text")
    if len(names) != len(set(names)):
        raise RecordError(f"layout: {key!r} has repeated names")
    return names


def _sizes(layout: ConfigRecord, key: str, count: int) -> list[int]:
    sizes = _list(layout, key, int, "whole numbers")
    if len(sizes) != count:
        raise RecordError(f"layout: {key!r} has {len(sizes)} values for {count} modules")
    if odd := [size for size in sizes if not 0 <= size <= _LARGEST_SIZE]:
        raise RecordError(f"layout: {key!r} has {odd[0]}, expected 0 to {_LARGEST_SIZE}")
    return sizes


def _list(layout: ConfigRecord, key: str, kind: type[T], expected: str) -> list[T]:
    values = layout.get(key)
    # The exact type: True would count as the number 1.
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise RecordError(f"layout: {key!r} is missing or not a list of {expected}")
    return cast(list[T], values)


def _numpy(arrays: ArrayRecord, key: str) -> Float32:
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

    ``numpy.load`` is not used: it parses whatever the header says, allocates what the header
    claims before it looks for the data, and raises half a dozen other kinds of error.
    """
    start = _NPY_HEADER_START + int.from_bytes(array.data[8:_NPY_HEADER_START], "little")
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {array.shape}, }}".encode()
    padded = header.ljust(start - _NPY_HEADER_START - 1) + b"\n"
    if array.data[:8] != _NPY_MAGIC or array.data[_NPY_HEADER_START:start] != padded:
        raise ValueError(f"not npy bytes of float32 in shape {array.shape}")
    count, num_bytes = prod(array.shape), len(array.data) - start
    if num_bytes != 4 * count:
        raise ValueError(f"{num_bytes} bytes of numbers, shape {array.shape} has {4 * count}")
    return np.frombuffer(array.data, np.float32, count, start).reshape(array.shape).copy()


def adapter_content(adapter: AdapterArrays, **records: ConfigRecord | MetricRecord) -> RecordDict:
    """Return a message content with an adapter and other records."""
    arrays, layout = pack(adapter)
    return RecordDict({ARRAYS: arrays, LAYOUT: layout, **records})


def read_adapter(content: RecordDict) -> AdapterArrays:
    """Read the adapter of a message content.

    Raises
    ------
    RecordError
        If there is none, or it is malformed.
    """
    if ARRAYS not in content.array_records or LAYOUT not in content.config_records:
        raise RecordError(f"no adapter in the message; it has {sorted(content)}")
    return unpack(content.array_records[ARRAYS], content.config_records[LAYOUT])


def plan_record(plan: TrainPlan) -> ConfigRecord:
    """Write a plan."""
    return ConfigRecord({PLAN: plan.to_json()})


def read_plan(content: RecordDict) -> TrainPlan:
    """Read the plan of a message content.

    Raises
    ------
    RecordError
        If there is none, or it is malformed.
    """
    try:
        return TrainPlan.from_json(str(content.config_records[PLAN][PLAN]))
    except (KeyError, ValueError) as error:
        raise RecordError(f"no readable plan in the message: {error}") from error


def read_label_names(content: RecordDict) -> tuple[str, ...] | None:
    """Read the names of the run's classes; None if the server does not say them.

    Raises
    ------
    RecordError
        If they are not a list of text.
    """
    names = content.config_records.get(CONFIG, ConfigRecord()).get(LABEL_NAMES)
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecordError(f"config: {LABEL_NAMES!r} is not a list of text")
    return tuple(cast(list[str], names))


def read_partition_id(content: RecordDict) -> int:
    """Read the number that the server gave a node which has none of its own.

    Raises
    ------
    RecordError
        If there is none, or it is no number from 0.
    """
    number = content.config_records.get(CONFIG, ConfigRecord()).get(PARTITION_ID)
    if type(number) is not int or number < 0:
        raise RecordError(f"config: {PARTITION_ID!r} is {number!r}, expected a number from 0")
    return number


def message_bytes(message: Message) -> int:
    """Count the bytes of a message's content as Flower sends it: every object of its tree, once.

    Flower's envelope is left out: some 150 bytes that differ with its random ids. Of an error
    reply the reason is counted.
    """
    if message.has_error():
        return len((message.error.reason or "").encode())
    total, stack, seen = 0, [message.content], set()
    while stack:
        node: Any = stack.pop()
        total += len(node.deflate())
        for object_id, child in (node.children or {}).items():
            if object_id not in seen:
                seen.add(object_id)
                stack.append(child)
    return total


def content_bytes(content: RecordDict) -> int:
    """Count the bytes of a content's arrays, values and names, 8 for a number, decoding nothing.

    Cheap, for refusing a reply by its size before it is unpacked; `message_bytes` counts what
    travels, at the cost of serialising everything again.
    """
    return sum(
        _value_bytes(part)
        for record in content.values()
        for entry in record.items()
        for part in entry
    )


def _value_bytes(value: object) -> int:
    if isinstance(value, Array):
        parts = (value.data, value.dtype, value.stype, *value.shape)
        return sum(_value_bytes(part) for part in parts)
    if isinstance(value, list):
        return sum(_value_bytes(item) for item in value)
    if isinstance(value, str):
        return len(value.encode(errors="replace"))
    return len(value) if isinstance(value, bytes) else 8


def head_bytes(content: RecordDict) -> int:
    """Count the bytes of the head's arrays in a message content."""
    return sum(
        len(array.data)
        for record in content.array_records.values()
        for key, array in record.items()
        if key.startswith(HEAD_PREFIX)
    )
