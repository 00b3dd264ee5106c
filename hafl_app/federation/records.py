"""Wire codec: adapters, plans and scores as Flower records. NumPy and bytes only.

All factors of a message travel in one flat array, so that small ranks do not pay for headers;
a layout record says how to cut it. Names on the wire are kebab-case and spelled only here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from hafl_app.plan import TrainPlan

ARRAYS, LAYOUT, PLAN, METRICS, CONFIG = "arrays", "layout", "plan", "metrics", "config"
FACTORS, HEAD_PREFIX, IMPORTANCE = "factors", "head/", "importance"
NUM_EXAMPLES, SERVER_ROUND = "num-examples", "server-round"

Float32 = NDArray[np.float32]


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
    names, ranks, widths, heights = (
        _list(layout, key) for key in ("modules", "ranks", "in-features", "out-features")
    )
    if not len(names) == len(ranks) == len(widths) == len(heights) == len(set(names)):
        raise RecordError(f"layout: {len(names)} modules, but {len(ranks)} ranks or repeated names")
    flat, start, modules = _numpy(arrays, FACTORS), 0, {}
    if any(size < 0 for sizes in (ranks, widths, heights) for size in sizes):
        raise RecordError("layout: negative sizes")
    expected = sum(r * (m + n) for r, m, n in zip(ranks, heights, widths, strict=True))
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
    names, counts = _list(layout, "scored-modules"), _list(layout, "num-scores")
    if not names:
        return
    flat = _numpy(arrays, IMPORTANCE)
    if len(names) != len(counts) or min(counts) < 0 or flat.shape != (sum(counts),):
        raise RecordError(f"importance: {flat.shape} numbers, the layout says {sum(counts)}")
    ends = np.cumsum(counts)
    for name, count, end in zip(names, counts, ends, strict=True):
        yield name, flat[end - count : end]


def _float32(array: NDArray[Any]) -> Float32:
    return np.ascontiguousarray(array, dtype=np.float32)


def _list(layout: ConfigRecord, key: str) -> list[Any]:
    value = layout.get(key)
    if not isinstance(value, list):
        raise RecordError(f"layout: {key!r} is {type(value).__name__}, expected a list")
    return value


def _numpy(arrays: ArrayRecord, key: str) -> Float32:
    if key not in arrays:
        raise RecordError(f"arrays: {key!r} is missing; there are {sorted(arrays)}")
    try:
        array = arrays[key].numpy()
    except (TypeError, ValueError, OSError) as error:
        raise RecordError(f"arrays: {key!r} cannot be read: {error}") from error
    if array.dtype != np.float32:
        raise RecordError(f"arrays: {key!r} has dtype {array.dtype}, expected float32")
    return array


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


def head_bytes(content: RecordDict) -> int:
    """Count the bytes of the head's arrays in a message content."""
    return sum(
        len(array.data)
        for record in content.array_records.values()
        for key, array in record.items()
        if key.startswith(HEAD_PREFIX)
    )
