"""The size of a content, compared with what Flower itself makes of it."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import given
from hypothesis import strategies as st

from hafl_app.wire import message_size as wire_size
from hafl_app.wire.message_size import CHUNK_BYTES, content_size


def as_flower_sends_it(content):
    """Serialize every object of the content's tree once."""
    return sum(len(child.deflate()) for child in get_all_nested_objects(content).values())


ARRAYS = st.builds(
    lambda shape, fill, dtype: Array(np.full(shape, fill, dtype)),
    st.sampled_from([(), (0, 3), (2, 3), (6,), (50, 7), (7, 50)]),
    st.integers(0, 2),
    st.sampled_from(["float32", "int8", "float64"]),
)
RECORDS = st.one_of(
    st.dictionaries(st.text(max_size=5), ARRAYS, max_size=5).map(ArrayRecord),
    st.dictionaries(
        st.text(max_size=5),
        st.one_of(st.booleans(), st.text(max_size=9), st.lists(st.integers(0, 9), max_size=4)),
        max_size=4,
    ).map(ConfigRecord),
    st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False), max_size=4).map(MetricRecord),
)


@given(st.dictionaries(st.text(max_size=5), RECORDS, max_size=4))
def test_it_is_what_flower_sends(records):
    # Few shapes and fills: the same arrays and records occur more than once.
    content = RecordDict(records)

    assert content_size(content) == as_flower_sends_it(content)


def big(*pieces):
    return Array("uint8", (7,), "numpy.ndarray", b"".join(pieces))


ZEROS, ONES = bytes(CHUNK_BYTES), b"\1" * CHUNK_BYTES
DIFFERS_INSIDE = bytes(1000) + b"\1" + bytes(CHUNK_BYTES - 1001)


@pytest.mark.parametrize(
    "arrays",
    [
        [big(ZEROS, ONES, b"rest")],
        [big(ZEROS, ZEROS, ZEROS)],
        [big(ZEROS, DIFFERS_INSIDE, ZEROS, DIFFERS_INSIDE)],
        [big(DIFFERS_INSIDE, ZEROS), big(ZEROS, ONES), big(ZEROS)],
    ],
)
def test_large_arrays_go_in_pieces_each_distinct_one_once(arrays):
    content = RecordDict({"a": ArrayRecord({str(i): a for i, a in enumerate(arrays)})})

    assert content_size(content) == as_flower_sends_it(content)


def test_the_numbers_of_distinct_arrays_are_not_read(monkeypatch):
    whole = []

    class Watching(wire_size._Pieces):
        def key(self, piece):
            result = super().key(piece)
            whole.append(len(self._whole))
            return result

    monkeypatch.setattr(wire_size, "_Pieces", Watching)
    arrays = {str(i): Array(np.full((50, 7 + i), i, np.float32)) for i in range(9)}

    content_size(RecordDict({"a": ArrayRecord(arrays)}))

    assert whole == [0] * 9
