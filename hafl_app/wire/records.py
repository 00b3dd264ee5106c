"""Wire codec: adapters, plans and scores as Flower records. NumPy and bytes only.

All factors of a message travel in one flat array, so that small ranks do not pay for headers;
a layout record describes its parts, as compressed JSON, with scores and scales as bytes beside it:
each further array would cost some 300 bytes. Names on the wire are kebab-case, spelled only here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.component_lists import format_bits, format_indices, parse_indices
from hafl_app.plan_parts.number_formats import NumberFormat
from hafl_app.wire.arrays import (
    DTYPES,
    SPARSE,
    Float32,
    Numbers,
    RecordError,
    joined,
    read_layout,
    read_names,
    read_npy,
    read_numbers,
    read_parts,
    read_sizes,
    read_sparse,
    read_text,
    read_texts,
    write_numbers,
    write_sparse,
    write_text,
)
from hafl_app.wire.bit_packing import (
    pack_pairs,
    read_bits,
    read_packed,
    unpack_pairs,
    write_packed,
)
from hafl_app.wire.compression import compress
from hafl_app.wire.message_size import content_size

ARRAYS, LAYOUT, PLAN, METRICS, CONFIG = "arrays", "layout", "plan", "metrics", "config"
FACTORS, HEAD_PREFIX, SCORES, SCALES = "factors", "head/", "scores", "scales"
BITS, COMPONENTS = "bits", "components"
NUM_EXAMPLES, SECONDS, SERVER_ROUND = "num-examples", "seconds", "server-round"
STEPS = "steps"
FLOPS = "flops"
"""Metric of a reply: floating-point operations of what was asked, see `hafl_app.training.flops`."""
CORRECTION, CORRECTION_LAYOUT = "correction", "correction-layout"
PARTITION_ID, LABEL_NAMES = "partition-id", "label-names"
ROUNDING_ERRORS, OWN_LORA_B = "rounding-errors", "own-lora-b"


@dataclass(frozen=True)
class AdapterArrays:
    """An adapter as arrays, in the number format of the message.

    Parameters
    ----------
    modules
        Module name to ``(lora_A (rank, in_features), lora_B (out_features, rank))``: float32;
        also with ``sparse``, where those that are 0 do not travel;
        with ``bf16`` the bits of bfloat16 as uint16, which NumPy does not have; int8; or with
        ``mixed`` codes as int16. A factor that does not travel has no features: that is how a
        layout says so.
    head
        Parameter name to array, float32.
    importance
        Module name to component scores, or empty; float32, and the bits of bfloat16 beside factors
        that are not.
    numbers
        The factors' format.
    scales
        With ``int8`` and ``mixed``, module name to ``(rank,)`` bits of bfloat16 for the rows of
        lora_A and the columns of lora_B: factors of their numbers. Those of a factor without
        features do not travel, and are read as 0.
    bits
        With ``mixed``, module name to the bits of each component's codes: 2, 4, 8 or 16.
    components
        Module name to the components that these are, where the client chose them; else empty.
    """

    modules: Mapping[str, tuple[Numbers, Numbers]]
    head: Mapping[str, Float32] = field(default_factory=dict)
    importance: Mapping[str, Numbers] = field(default_factory=dict)
    numbers: NumberFormat = "fp32"
    scales: Mapping[str, tuple[Numbers, Numbers]] = field(default_factory=dict)
    bits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    components: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def pack(adapter: AdapterArrays) -> tuple[ArrayRecord, ConfigRecord]:
    """Write an adapter as ``(arrays, layout)``; values survive bit for bit."""
    pairs = adapter.modules.values()
    arrays = {FACTORS: _write_factors(adapter)}
    for name, array in adapter.head.items():
        arrays[HEAD_PREFIX + name] = Array(np.ascontiguousarray(array, np.float32))
    layout = {
        "modules": list(adapter.modules),
        "ranks": [lora_A.shape[0] for lora_A, _ in pairs],
        "in-features": [lora_A.shape[1] for lora_A, _ in pairs],
        "out-features": [lora_B.shape[0] for _, lora_B in pairs],
        "scored-modules": list(adapter.importance),
        "num-scores": [len(scores) for scores in adapter.importance.values()],
    }
    if adapter.numbers == "mixed":
        layout[BITS] = [format_bits(adapter.bits[name]) for name in adapter.modules]
    if adapter.components:
        layout[COMPONENTS] = [format_indices(adapter.components[n]) for n in adapter.modules]
    record = ConfigRecord({LAYOUT: write_text(layout)})
    if adapter.importance:
        scores = joined(adapter.importance.values(), _score_dtype(adapter.numbers))
        record[SCORES] = scores.tobytes()
    if adapter.numbers in ("int8", "mixed"):
        scales = (
            of_factor
            for name, pair in adapter.modules.items()
            for factor, of_factor in zip(pair, adapter.scales[name], strict=True)
            if factor.size
        )
        record[SCALES] = joined(scales, DTYPES["bf16"]).tobytes()
    return ArrayRecord(arrays), record


def unpack(arrays: ArrayRecord, record: ConfigRecord) -> AdapterArrays:
    """Read the adapter of ``(arrays, layout)``.

    Raises
    ------
    RecordError
        If arrays and layout do not fit together, or are not of the codec's types.
    """
    layout = read_layout(record, LAYOUT)
    numbers: NumberFormat
    if BITS in layout:
        scales = _scales(record, layout)  # first: as many components as there are, and no more
        numbers, bits = "mixed", read_bits(layout, BITS)
        modules = unpack_pairs(layout, bits, read_packed(arrays, FACTORS))
    elif _is_sparse(arrays):
        numbers, flat = "sparse", read_sparse(arrays, FACTORS, _count(layout))
        bits, scales, modules = {}, {}, _cut_factors(layout, flat)
    else:
        numbers, flat = read_numbers(arrays, FACTORS)
        bits, modules = {}, _cut_factors(layout, flat)
        scales = _scales(record, layout) if numbers == "int8" else {}
    head = {
        key.removeprefix(HEAD_PREFIX): read_npy(arrays, key)
        for key in arrays
        if key.startswith(HEAD_PREFIX)
    }
    scores = dict(_scores(record, layout, _score_dtype(numbers)))
    components = _components(layout, modules) if COMPONENTS in layout else {}
    return AdapterArrays(modules, head, scores, numbers, scales, bits, components)


def _write_factors(adapter: AdapterArrays) -> Array:
    if adapter.numbers == "mixed":
        return write_packed(pack_pairs(adapter.modules, adapter.bits))
    parts = (part for pair in adapter.modules.values() for part in pair)
    if adapter.numbers == "sparse":
        return write_sparse(parts)
    return write_numbers(parts, DTYPES[adapter.numbers])


def _is_sparse(arrays: ArrayRecord) -> bool:
    factors = arrays.get(FACTORS)
    return factors is not None and factors.stype == SPARSE


def _count(layout: Mapping[str, Any]) -> int:
    """Return how many numbers the factors of a layout have."""
    names = read_names(layout, "modules")
    ranks, widths, heights = (
        read_sizes(layout, key, len(names)) for key in ("ranks", "in-features", "out-features")
    )
    return sum(r * (m + n) for r, m, n in zip(ranks, heights, widths, strict=True))


def _cut_factors(layout: Mapping[str, Any], flat: Numbers) -> dict[str, tuple[Numbers, Numbers]]:
    names = read_names(layout, "modules")
    ranks, widths, heights = (
        read_sizes(layout, key, len(names)) for key in ("ranks", "in-features", "out-features")
    )
    expected = sum(r * (m + n) for r, m, n in zip(ranks, heights, widths, strict=True))
    if flat.shape != (expected,):
        raise RecordError(f"factors: {flat.shape} numbers, the layout says {expected}")
    start, modules = 0, {}
    for name, rank, height, width in zip(names, ranks, heights, widths, strict=True):
        middle, end = start + rank * width, start + rank * (width + height)
        modules[name] = (
            flat[start:middle].reshape(rank, width),
            flat[middle:end].reshape(height, rank),
        )
        start = end
    return modules


def _components(
    layout: Mapping[str, Any], modules: Mapping[str, tuple[Numbers, Numbers]]
) -> dict[str, tuple[int, ...]]:
    """Read the components that a client chose, as many as it has uploaded of each module."""
    texts = read_texts(layout, COMPONENTS, len(modules))
    chosen = {}
    for (name, (lora_A, lora_B)), text in zip(modules.items(), texts, strict=True):
        rank = lora_A.shape[0]
        if rank and not (lora_A.size or lora_B.size):  # or no bytes would bound the rank
            raise RecordError(f"layout: {name!r} has rank {rank} and neither factor")
        try:
            chosen[name] = parse_indices(text)
        except ValueError as error:
            raise RecordError(f"layout: {name!r}: {error}") from error
        if len(chosen[name]) != rank:
            raise RecordError(
                f"layout: {name!r} names {len(chosen[name])} components and has {rank}"
            )
    return chosen


def _scores(
    record: ConfigRecord, layout: Mapping[str, Any], dtype: str
) -> Iterator[tuple[str, Numbers]]:
    names = read_names(layout, "scored-modules")
    counts = read_sizes(layout, "num-scores", len(names))
    if names:
        yield from zip(names, read_parts(record, SCORES, dtype, counts), strict=True)


def _scales(record: ConfigRecord, layout: Mapping[str, Any]) -> dict[str, tuple[Numbers, Numbers]]:
    names = read_names(layout, "modules")
    ranks, widths, heights = (
        read_sizes(layout, key, len(names)) for key in ("ranks", "in-features", "out-features")
    )
    for name, rank, width, height in zip(names, ranks, widths, heights, strict=True):
        if rank and not (width or height):  # or no bytes would bound the rank
            raise RecordError(f"layout: {name!r} has rank {rank} and neither factor")
    sides = [side for pair in zip(widths, heights, strict=True) for side in pair]
    each = [rank for rank in ranks for _ in ("lora_A", "lora_B")]
    counts = [rank if side else 0 for rank, side in zip(each, sides, strict=True)]
    parts = read_parts(record, SCALES, DTYPES["bf16"], counts)
    # Of a factor that does not travel as well, so that there is one for every component.
    parts = [
        part if side else np.zeros(rank, part.dtype)
        for part, side, rank in zip(parts, sides, each, strict=True)
    ]
    return dict(zip(names, zip(parts[::2], parts[1::2], strict=True), strict=True))


def _score_dtype(numbers: NumberFormat) -> str:
    return DTYPES["fp32" if numbers in ("fp32", "sparse") else "bf16"]


def adapter_content(adapter: AdapterArrays, **records: ConfigRecord | MetricRecord) -> RecordDict:
    """Return a message content of an adapter and other records."""
    arrays, layout = pack(adapter)
    return RecordDict({ARRAYS: arrays, LAYOUT: layout, **records})


def read_adapter(content: RecordDict) -> AdapterArrays:
    """Read the adapter of a message content.

    Raises
    ------
    RecordError
        If there is none, or it is malformed.
    """
    # Not by RecordDict's views of one kind of record: they are made anew each time.
    arrays, layout = content.get(ARRAYS), content.get(LAYOUT)
    if not (isinstance(arrays, ArrayRecord) and isinstance(layout, ConfigRecord)):
        raise RecordError(f"no adapter in the message; it has {sorted(content)}")
    return unpack(arrays, layout)


def with_correction(content: RecordDict, correction: AdapterArrays) -> RecordDict:
    """Return a request's content with a correction of gradients beside the adapter."""
    arrays, layout = pack(correction)
    return RecordDict({**content, CORRECTION: arrays, CORRECTION_LAYOUT: layout})


def read_correction(content: RecordDict) -> AdapterArrays | None:
    """Read the correction of a request; None if there is none.

    Raises
    ------
    RecordError
        If it is malformed.
    """
    if CORRECTION not in content:
        return None
    arrays, layout = content.get(CORRECTION), content.get(CORRECTION_LAYOUT)
    if not (isinstance(arrays, ArrayRecord) and isinstance(layout, ConfigRecord)):
        raise RecordError(f"no readable {CORRECTION} in the message")
    return unpack(arrays, layout)


def config_of(content: RecordDict, name: str) -> ConfigRecord:
    """Return a content's config record of this name; an empty one if there is none."""
    record = content.get(name)
    return record if isinstance(record, ConfigRecord) else ConfigRecord()


def plan_record(plan: TrainPlan) -> ConfigRecord:
    """Write a plan."""
    return ConfigRecord({PLAN: compress(plan.to_json())})


def read_plan(content: RecordDict) -> TrainPlan:
    """Read the plan of a message content.

    Raises
    ------
    RecordError
        If there is none, or it is malformed.
    """
    record = config_of(content, PLAN)
    try:
        return TrainPlan.from_json(read_text(record, PLAN))
    except ValueError as error:
        raise RecordError(f"no readable plan in the message: {error}") from error


def message_bytes(message: Message) -> int:
    """Count the bytes of a message's content as Flower sends it: every object of its tree, once.

    Flower's envelope is left out: some 150 bytes that differ with its random ids. Of an error
    reply the reason is counted.
    """
    if message.has_error():
        return len((message.error.reason or "").encode())
    return content_size(message.content)


def content_bytes(content: RecordDict) -> int:
    """Count the bytes of a content's arrays, values and names, 8 for a number, decoding nothing.

    For rejecting content by its size before it is unpacked; `message_bytes` counts the traffic.
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
        for record in content.values()
        if isinstance(record, ArrayRecord)
        for key, array in record.items()
        if key.startswith(HEAD_PREFIX)
    )
