"""Sums of features on the wire: exact in float64, and read by what was asked for alone."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from hafl_app.heads.feature_sums import FeatureSums
from hafl_app.wire.arrays import RecordError
from hafl_app.wire.feature_sums import (
    SUMS,
    SumsFormat,
    read_losses,
    read_sums,
    write_losses,
    write_sums,
)
from hafl_app.wire.message_size import content_size

WIDTH, CLASSES = 6, 3


def some_sums(moments: bool = True) -> FeatureSums:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.arange(20) % CLASSES
    return FeatureSums.of(features, labels, CLASSES, moments=moments)


def content(sums: FeatureSums, numbers: str) -> RecordDict:
    return RecordDict({SUMS: write_sums(sums, numbers)})


def asked(numbers: str = "fp64", moments: bool = True) -> SumsFormat:
    return SumsFormat(WIDTH, CLASSES, moments, numbers)


@pytest.mark.parametrize("moments", [True, False])
class TestRoundTrip:
    def test_float64_is_exact(self, moments):
        sums = some_sums(moments)
        read = read_sums(content(sums, "fp64"), asked("fp64", moments))
        assert torch.equal(read.class_counts, sums.class_counts)
        assert torch.equal(read.class_sums, sums.class_sums)
        assert (read.moments is None) == (not moments)
        if moments:
            assert torch.allclose(read.moments, sums.moments, rtol=1e-14)

    def test_float32_rounds_the_sums_and_no_count(self, moments):
        sums = some_sums(moments)
        read = read_sums(content(sums, "fp32"), asked("fp32", moments))
        assert torch.equal(read.class_counts, sums.class_counts)
        assert torch.equal(read.class_sums, sums.class_sums.float().double())

    def test_the_bytes_are_those_of_the_numbers(self, moments):
        format_asked = asked("fp32", moments)
        expected = 4 * (WIDTH * CLASSES + moments * WIDTH * (WIDTH + 1) // 2) + 8 * CLASSES
        assert format_asked.payload_bytes == expected
        size = content_size(content(some_sums(moments), "fp32"))
        assert expected < size < expected + 2000


def changed(**arrays: Array | None) -> RecordDict:
    record = dict(write_sums(some_sums(), "fp64"))
    for name, array in arrays.items():
        key = name.replace("_", "-")
        if array is None:
            del record[key]
        else:
            record[key] = array
    return RecordDict({SUMS: ArrayRecord(record)})


def raw(values: np.ndarray) -> Array:
    return Array(str(values.dtype), values.shape, "raw", values.tobytes())


MALFORMED = [
    (RecordDict(), "no 'feature-sums' in the message"),
    (RecordDict({SUMS: ConfigRecord()}), "no 'feature-sums' in the message"),
    (changed(moments=None), "expected ['class-counts', 'class-sums', 'moments']"),
    (changed(extra=raw(np.zeros(3))), "expected ['class-counts', 'class-sums', 'moments']"),
    (content(some_sums(moments=False), "fp64"), "expected ['class-counts'"),
    (content(some_sums(), "fp32"), "'class-sums' is float32 (6, 3), expected float64 (6, 3)"),
    (changed(class_counts=raw(np.zeros(3))), "'class-counts' is float64 (3,), expected int64 (3,)"),
    (changed(moments=raw(np.zeros((6, 6)))), "'moments' is float64 (6, 6), expected float64 (21,)"),
    (changed(moments=Array("float64", (21,), "numpy.ndarray", b"")), "'moments'"),
    (changed(moments=Array("float64", (21,), "raw", bytes(20))), "'moments'"),
    (changed(class_sums=Array("float64", (2**40, 3), "raw", bytes(8))), "'class-sums'"),
]


@pytest.mark.parametrize(("message", "reason"), MALFORMED)
def test_anything_else_is_refused(message, reason):
    with pytest.raises(RecordError) as error:
        read_sums(message, asked())
    assert reason in str(error.value)


@settings(deadline=None, max_examples=60)
@given(
    data=st.binary(max_size=300),
    dtype=st.sampled_from(["float64", "float32", "int64", "object", "x"]),
    shape=st.lists(st.integers(-3, 2**33), max_size=3),
    stype=st.sampled_from(["raw", "numpy.ndarray", ""]),
    key=st.sampled_from(["class_counts", "class_sums", "moments"]),
)
def test_noise_is_read_or_refused(data, dtype, shape, stype, key):
    message = changed(**{key: Array(dtype, tuple(shape), stype, data)})
    try:
        read_sums(message, asked())
    except RecordError:
        return


def test_losses_survive():
    losses = torch.tensor([1.5, 0.25], dtype=torch.float64)
    message = RecordDict({SUMS: write_losses(losses)})
    assert torch.equal(read_losses(message, 2), losses)
    with pytest.raises(RecordError, match="losses"):
        read_losses(message, 3)
