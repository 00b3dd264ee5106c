import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from hafl_app.federation.inprocess import server_identity
from hafl_app.federation.records import (
    AdapterArrays,
    RecordError,
    adapter_content,
    head_bytes,
    message_bytes,
    pack,
    plan_record,
    read_adapter,
    read_plan,
    unpack,
)
from hafl_app.plan import ModulePlan, TrainPlan


def bits(seed, shape):
    """Any float32 there is: also denormals, infinities and NaN with their payload."""
    raw = np.random.default_rng(seed).integers(0, 2**32, size=shape, dtype=np.uint32)
    return raw.view(np.float32)


@st.composite
def adapters(draw):
    names = draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=4))
    modules, importance = {}, {}
    for seed, name in enumerate(names):
        rank, width, height = (
            draw(st.integers(0, 5)),
            draw(st.integers(1, 6)),
            draw(st.integers(1, 6)),
        )
        modules[name] = (bits(seed, (rank, width)), bits(seed + 50, (height, rank)))
        if draw(st.booleans()):
            importance[name] = bits(seed + 99, rank)
    head = {"weight": bits(7, (2, 3)), "bias": bits(8, 2)} if draw(st.booleans()) else {}
    return AdapterArrays(modules, head, importance)


def same_bits(a, b):
    return a.shape == b.shape and a.tobytes() == b.tobytes()


class TestCodec:
    @given(adapters())
    def test_values_survive_bit_for_bit(self, adapter):
        got = unpack(*pack(adapter))

        assert list(got.modules) == list(adapter.modules)
        for name, (lora_A, lora_B) in adapter.modules.items():
            assert same_bits(got.modules[name][0], lora_A)
            assert same_bits(got.modules[name][1], lora_B)
        assert set(got.head) == set(adapter.head)
        assert all(same_bits(got.head[n], adapter.head[n]) for n in adapter.head)
        assert set(got.importance) == set(adapter.importance)
        assert all(same_bits(got.importance[n], adapter.importance[n]) for n in adapter.importance)

    def test_survives_flowers_own_serialisation(self):
        adapter = AdapterArrays({"q": (bits(1, (2, 5)), bits(2, (7, 2)))}, {"w": bits(3, (3, 7))})
        arrays, layout = pack(adapter)
        children = {a.object_id: a for a in arrays.values()}

        again = ArrayRecord.inflate(arrays.deflate(), children)

        assert same_bits(unpack(again, layout).modules["q"][1], adapter.modules["q"][1])

    def test_overhead_is_small(self):
        # 12 modules of MiniLM's width, the lowest rank in use: the worst case that matters.
        modules = {
            f"encoder.layer.0.attention.self.module{i}": (bits(i, (2, 384)), bits(i, (384, 2)))
            for i in range(12)
        }
        ideal = 12 * 2 * (384 + 384) * 4
        with server_identity():
            message = Message(adapter_content(AdapterArrays(modules)), 1, MessageType.TRAIN)
        assert (
            ideal < message_bytes(message) < ideal * 1.025
        )  # 2.1 % measured: rank 2, nothing wider than 384


class TestMalformed:
    def change_layout(self, **changes):
        arrays, layout = pack(AdapterArrays({"q": (bits(1, (2, 5)), bits(2, (7, 2)))}))
        for key, value in changes.items():
            layout[key.replace("_", "-")] = value
        return arrays, layout

    @pytest.mark.parametrize(
        "changes",
        [
            {"ranks": [3]},
            {"ranks": [-2]},
            {"ranks": [2, 2]},
            {"modules": ["q", "q"]},
            {"modules": "q"},
            {"in_features": [7]},
        ],
    )
    def test_a_layout_that_does_not_fit_is_refused(self, changes):
        with pytest.raises(RecordError, match=r"layout|factors"):
            unpack(*self.change_layout(**changes))

    def test_missing_arrays_are_named(self):
        _, layout = pack(AdapterArrays({}))
        with pytest.raises(RecordError, match="'factors' is missing"):
            unpack(ArrayRecord(), layout)

    def test_another_dtype_is_refused(self):
        arrays, layout = pack(AdapterArrays({"q": (bits(1, (2, 5)), bits(2, (7, 2)))}))
        arrays["factors"] = Array(np.zeros(24, dtype=np.float64))
        with pytest.raises(RecordError, match="float64"):
            unpack(arrays, layout)

    def test_bytes_that_are_no_array_are_refused(self):
        arrays, layout = pack(AdapterArrays({}))
        arrays["factors"] = Array("float32", (0,), "numpy.ndarray", b"\x80\x04garbage")
        with pytest.raises(RecordError, match="cannot be read"):
            unpack(arrays, layout)

    def test_a_message_without_adapter_or_plan_is_refused(self):
        with pytest.raises(RecordError, match="no adapter"):
            read_adapter(RecordDict())
        with pytest.raises(RecordError, match="plan"):
            read_plan(RecordDict())
        with pytest.raises(RecordError, match="plan"):
            read_plan(RecordDict({"plan": ConfigRecord({"plan": "{}"})}))


def test_plans_travel():
    plan = TrainPlan({"q": ModulePlan((0, 1, 2, 5), (1, 5), 16 / 30)}, importance="smoothed")
    assert read_plan(RecordDict({"plan": plan_record(plan)})) == plan


def test_heads_are_counted_apart():
    head = {"weight": bits(3, (3, 7)), "bias": bits(4, 3)}
    content = adapter_content(AdapterArrays({"q": (bits(1, (2, 5)), bits(2, (7, 2)))}, head))
    # npy: a header of 128 bytes and the numbers.
    assert head_bytes(content) == 2 * 128 + 4 * (3 * 7 + 3)


def test_a_shared_record_is_counted_for_every_message():
    content = adapter_content(AdapterArrays({"q": (bits(1, (2, 5)), bits(2, (7, 2)))}))
    with server_identity():
        first, second = (Message(content, n, MessageType.TRAIN) for n in (1, 2))
    assert message_bytes(first) == message_bytes(second) > 4 * 24
