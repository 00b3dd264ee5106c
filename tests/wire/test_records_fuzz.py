"""Damaged and hostile messages: refused by name, or read as exactly what they say."""

import io
import json
import math
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layout_words import change_layout, layout_of, write_layout

from hafl_app.data.labels import label_fault
from hafl_app.engines.in_process import server_identity
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.component_lists import format_bits, parse_indices
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.plan_parts.tail_pruning import TailPruning
from hafl_app.wire.arrays import RecordError
from hafl_app.wire.compression import CompressedTextError, compress, decompress
from hafl_app.wire.node_profile import PROFILE, NodeProfile
from hafl_app.wire.records import (
    AdapterArrays,
    adapter_content,
    content_bytes,
    message_bytes,
    pack,
    plan_record,
    read_adapter,
    read_plan,
)

SOAK = settings(max_examples=10_000, suppress_health_check=list(HealthCheck))


def counting(*shape):
    """Numbers that all differ, so that a wrong cut shows."""
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape) + sum(shape)


HEAD = {"weight": counting(3, 7), "bias": counting(3)}
ADAPTER = AdapterArrays(
    {"q.0": (counting(2, 5), counting(7, 2)), "v.1": (counting(3, 4), counting(6, 3))},
    HEAD,
    {"q.0": counting(2), "v.1": counting(3)},
)


def rounded(numbers, dtype):
    """The same adapter in fewer bits; int8 has scales."""

    def cast(arrays, dtype=dtype):
        return tuple(array.astype(dtype) for array in arrays)

    modules = {name: cast(pair) for name, pair in ADAPTER.modules.items()}
    scores = {name: array.astype(np.uint16) for name, array in ADAPTER.importance.items()}
    scales = {"q.0": cast((counting(2), counting(2)), np.uint16)} | {
        "v.1": cast((counting(3), counting(3) + 7), np.uint16)
    }
    return AdapterArrays(modules, HEAD, scores, numbers, scales if numbers == "int8" else {})


def mixed():
    """The same adapter with bits for every component."""
    bits = {"q.0": (16, 2), "v.1": (8, 4, 4)}
    signs = {n: tuple(np.sign(a - a.mean()) for a in pair) for n, pair in ADAPTER.modules.items()}
    modules = {n: tuple(a.astype(np.int16) for a in pair) for n, pair in signs.items()}
    return replace(rounded("int8", np.int8), modules=modules, numbers="mixed", bits=bits)


ADAPTERS = (ADAPTER, rounded("bf16", np.uint16), rounded("int8", np.int8), mixed())
PLAN = TrainPlan(
    {"q": ModulePlan((0, 1, 2, 5), (1, 5), 16 / 30), "v": ModulePlan((3,), (3,), 2.0)},
    head="frozen",
    importance="smoothed",
    importance_smoothing=0.5,
    probe_batches=3,
    tail=TailPruning(0.75, 0.1, 2),
    local_epochs=2,
    max_steps=40,
    upload="int8",
    error_feedback=True,
)
MIXED_PLAN = replace(
    PLAN,
    modules={
        "q": ModulePlan((0, 1, 2, 5), (1, 5, 0), 16 / 30, (16, 4, 0)),
        "v": ModulePlan((3,), (3,), 2.0, (2,)),
    },
    upload="mixed",
)
ONE_FACTOR_PLAN = replace(
    MIXED_PLAN,
    modules={
        "q": replace(MIXED_PLAN.modules["q"], factors="A"),
        "v": replace(MIXED_PLAN.modules["v"], factors="B"),
    },
)
NODE = NodeProfile(3, 8, 4, 120, "cuda", rank_pattern={"output.dense": 2}, bandwidth_kbps=900)
OWN_DATA_NODE = replace(NODE, own_data=True, label_names=("food", "music"))
UNNUMBERED_NODE = replace(OWN_DATA_NODE, partition_id=-1, num_partitions=0)

integers = st.integers(-3, 12) | st.sampled_from([-(2**63), 2**31, 2**62, 2**63 - 1, 10**30])
floats = st.floats() | st.sampled_from([2.0, -0.0])
texts = st.sampled_from(["", "q.0", "v.1", "float32", "\n", "\x00", "9" * 40]) | st.text(max_size=5)
scalars = st.booleans() | integers | floats | texts | st.binary(max_size=9)
lists = st.one_of(
    *(st.lists(kind, max_size=4) for kind in (st.booleans(), integers, floats, texts, st.binary()))
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | integers
    | floats
    | texts
    | st.sampled_from(["0-3", "1,1", "frozen"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=5,
)
shapes = st.lists(integers, max_size=4).map(tuple)


def npy(array, **changes):
    """Bytes of an array, with another word in the header or another version."""
    file = io.BytesIO()
    np.save(file, array)
    data = file.getvalue()
    for old, new in changes.values():
        data = data.replace(old, new)
    return data


def npz(array):
    file = io.BytesIO()
    np.savez_compressed(file, array)
    return file.getvalue()


def lying_npy(shape, descr="'<f4'", fortran="False"):
    """Bytes whose header claims any shape, with the length field right and little data."""
    text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(96)


foreign_data = st.sampled_from(
    [
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04",
        b"PK\x05\x06" + bytes(18),
        npz(counting(4)),
        npy(counting(4).astype(np.float64)),
        npy(counting(4).astype(">f4")),
        npy(np.asfortranarray(counting(3, 7))),
        npy(counting(4), version=(b"NUMPY\x01", b"NUMPY\x02")),
        lying_npy("(24L,)"),
        lying_npy("(True, 24)"),
        lying_npy("(" * 300),
        lying_npy(f"({'9' * 5000},)"),
        lying_npy("(24,)", descr="'|V0'"),
        lying_npy("(24,)", descr="'O'"),
        lying_npy("(24,)", descr="[('a', 'O')]"),
        lying_npy("(3, 8)", fortran="True"),
    ]
)


@st.composite
def damaged_bytes(draw, data):
    mutated = bytearray(data)
    start = draw(st.integers(0, len(mutated)))
    kind = draw(st.sampled_from(["flip", "cut", "insert", "remove", "foreign"]))
    if kind == "foreign":
        return draw(foreign_data)
    if kind == "flip" and start < len(mutated):
        mutated[start] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
        del mutated[start:]
    elif kind == "insert":
        mutated[start:start] = draw(st.binary(max_size=8))
    else:
        del mutated[start : start + draw(st.sampled_from([1, 4, 12]))]
    return bytes(mutated)


def damage_array(draw, arrays):
    key = draw(st.sampled_from(sorted(arrays)))
    old = arrays[key]
    data = draw(damaged_bytes(old.data) | st.just(old.data))
    shape = draw(st.just(old.shape) | shapes)
    dtype = draw(st.just(old.dtype) | st.sampled_from(["float64", "object", "<f4", "", "int8"]))
    stype = draw(st.just(old.stype) | texts | st.just("raw"))
    if draw(st.booleans()):  # a header that agrees with the shape
        data = lying_npy(shape) if draw(st.booleans()) else npy(counting(2, 3))
    arrays[key] = Array(dtype, shape, stype, data)


def damage_names(draw, arrays):
    key = draw(st.sampled_from(sorted(arrays)))
    array = arrays[key]
    del arrays[key]
    if draw(st.booleans()):
        arrays[draw(texts | st.sampled_from(["head/", "head/new", "importance"]))] = array


def damage_bytes_of_layout(draw, record):
    key = draw(st.sampled_from(sorted(record)))
    kind = draw(st.sampled_from(["remove", "replace", "damage"]))
    if kind == "remove":
        del record[key]
    elif kind == "replace" or not isinstance(record[key], bytes):
        record[key] = draw(scalars | lists)
    else:
        record[key] = draw(damaged_bytes(record[key]))


def damage_layout(draw, layout):
    key = draw(st.sampled_from(sorted(layout)))
    kind = draw(st.sampled_from(["remove", "replace", "element", "repeat", "swap"]))
    values = list(layout[key]) if isinstance(layout[key], list) else []
    if kind == "remove":
        del layout[key]
    elif kind == "replace" or not values:
        layout[key] = draw(json_values)
    elif kind == "element" and type(values[0]) is int:
        values[draw(st.integers(0, len(values) - 1))] = draw(integers)
        layout[key] = values
    else:
        layout[key] = values[::-1] if kind == "swap" else values + values[:1]


@st.composite
def damaged_contents(draw):
    content = adapter_content(draw(st.sampled_from(ADAPTERS)))
    said = layout_of(content)
    kinds = ["array", "array", "layout", "layout", "bytes", "bytes", "names", "record"]
    for _ in range(draw(st.integers(1, 3))):
        arrays, record = content["arrays"], content["layout"]
        kind = draw(st.sampled_from(kinds))
        if kind == "record":
            wrong = st.sampled_from([MetricRecord({"x": 1}), ConfigRecord({}), ArrayRecord()])
            content[draw(st.sampled_from(["arrays", "layout", "more"]))] = draw(wrong)
            return content
        if kind == "array" and arrays:
            damage_array(draw, arrays)
        elif kind == "names" and arrays:
            damage_names(draw, arrays)
        elif kind == "bytes" and record:
            damage_bytes_of_layout(draw, record)
        elif said:
            damage_layout(draw, said)
            write_layout(content, said)
    return content


def numbers(array):
    """Payload of npy bytes, or of bytes without a header, found without the codec."""
    if array.stype == "raw":
        return array.shape, array.dtype, array.data
    return array.shape, array.data[array.data.index(b"\n", 10) + 1 :]


def check_adapter(content):
    """Only a refusal in one line, or the very names, sizes and numbers of the message."""
    before = content_bytes(content)
    try:
        got = read_adapter(content)
    except RecordError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
        return
    arrays, layout = pack(got)
    said = layout_of(content)
    for key, values in layout_of(RecordDict({"layout": layout})).items():
        assert repr(values) == repr(said[key])
    for key in set(layout) - {"layout"}:
        assert layout[key] == content["layout"][key]
    assert ("scales" in layout) == (content["arrays"]["factors"].dtype in ("int8", "uint8"))
    sent = content["arrays"]
    for key in {key for key in sent if key == "factors" or key.startswith("head/")}:
        assert numbers(arrays[key]) == numbers(sent[key])
    assert content_bytes(content) == before


class TestAdapters:
    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_what_is_not_damaged_passes_the_check(self, adapter):
        content = adapter_content(adapter)
        check_adapter(content)
        assert set(read_adapter(content).head) == {"weight", "bias"}
        assert read_adapter(content).numbers == adapter.numbers

    @settings(max_examples=400)
    @given(damaged_contents())
    def test_damage_is_refused_or_read_as_it_is(self, content):
        check_adapter(content)

    @pytest.mark.soak
    @SOAK
    @given(damaged_contents())
    def test_ten_thousand_damages_are_refused_or_read_as_they_are(self, content):
        check_adapter(content)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("ranks", [2, True]),
            ("ranks", [2.0, 3.0]),
            ("ranks", ["2", "3"]),
            ("ranks", [2, 3, 1]),
            ("ranks", [2, -3]),
            ("in-features", [5, 2**31]),
            ("out-features", [7, 2**63]),
            ("modules", [0, 1]),
            ("modules", {"q.0": 1, "v.1": 2}),
            ("modules", None),
            ("modules", ["q.0", "q.0"]),
            ("scored-modules", ["q.0", "q.0"]),
            ("scored-modules", "q.0"),
            ("num-scores", []),
            ("num-scores", [2]),
            ("num-scores", [5, 0, 0]),
            ("num-scores", [6, -1]),
            ("num-scores", [2.0, 3.0]),
            ("num-scores", ["2", "3"]),
        ],
    )
    def test_a_layout_of_another_kind_is_refused(self, key, value):
        content = adapter_content(ADAPTER)
        change_layout(content, **{key: value})
        with pytest.raises(RecordError, match=f"layout: '{key}'"):
            read_adapter(content)

    @pytest.mark.parametrize(
        "texts", [["16,2"], ["16,2", "8,4"], ["16,2", "8,4,0"], [16, 8], "16,2", {}, None]
    )
    def test_bits_of_another_kind_are_refused(self, texts):
        content = adapter_content(ADAPTERS[3])
        change_layout(content, bits=texts)
        with pytest.raises(RecordError, match=r"layout: .*bits"):
            read_adapter(content)

    @pytest.mark.parametrize("wrong", [0, 2])
    def test_bits_beside_numbers_that_have_none_are_refused(self, wrong):
        content = adapter_content(ADAPTERS[wrong])
        change_layout(content, bits=["16,2", "8,4x2"])
        with pytest.raises(RecordError, match=r"'scales' is missing|expected uint8 as 'raw'"):
            read_adapter(content)

    @pytest.mark.parametrize(
        ("height", "message"),
        [(0, "'0' has rank 60000 and neither factor"), (1, "'scales' has .* bytes, expected")],
    )
    def test_few_characters_cannot_mean_many_components(self, height, message):
        content = adapter_content(ADAPTERS[3])
        names = [str(i) for i in range(5000)]
        many = {"in-features": [0] * 5000, "out-features": [height] * 5000}
        many["ranks"] = [60_000] * 5000
        change_layout(content, modules=names, bits=["2x60000"] * 5000, **many)
        tracemalloc.start()
        try:
            with pytest.raises(RecordError, match=message):
                read_adapter(content)
            assert tracemalloc.get_traced_memory()[1] < 10_000_000
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("key", ["scores", "scales"])
    @pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0\0", lambda b: b""])
    def test_bytes_that_are_too_few_or_too_many_are_refused(self, key, change):
        content = adapter_content(ADAPTERS[2])
        content["layout"][key] = change(content["layout"][key])
        with pytest.raises(RecordError, match=f"layout: '{key}' has .* bytes, expected"):
            read_adapter(content)

    @pytest.mark.parametrize("key", ["layout", "scores", "scales"])
    @pytest.mark.parametrize("value", ["text", 3, [b"x"], None])
    def test_bytes_of_another_kind_are_refused(self, key, value):
        content = adapter_content(ADAPTERS[2])
        if value is None:
            del content["layout"][key]
        else:
            content["layout"][key] = value
        with pytest.raises(RecordError, match=f"'{key}' is missing or no bytes"):
            read_adapter(content)

    @pytest.mark.parametrize(
        ("dtype", "shape", "data"),
        [
            ("int8", (23,), bytes(24)),
            ("int8", (4, 6), bytes(24)),
            ("uint16", (24,), bytes(47)),
            ("uint16", (24,), bytes(24)),
            ("float32", (24,), bytes(96)),
            ("object", (24,), bytes(24)),
        ],
    )
    def test_numbers_without_a_header_have_a_known_kind_and_length(self, dtype, shape, data):
        content = adapter_content(ADAPTERS[2])
        content["arrays"]["factors"] = Array(dtype, shape, "raw", data)
        with pytest.raises(RecordError, match=r"'factors' (cannot be read|has dtype)"):
            read_adapter(content)

    def test_a_layout_nested_too_deep_is_refused(self):
        content = adapter_content(ADAPTER)
        content["layout"]["layout"] = compress("[" * 100_000)
        with pytest.raises(RecordError, match=r"layout: .*recursion"):
            read_adapter(content)

    def test_sizes_that_only_add_up_are_refused_by_the_numbers(self):
        content = adapter_content(ADAPTER)
        change_layout(content, ranks=[0, 2**31 - 1])
        with pytest.raises(RecordError, match="the layout says 21474836470"):
            read_adapter(content)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            npz(counting(4)),
            b"PK\x03\x04junk",
            lying_npy("(9L,)"),
            lying_npy("(24,)").replace(b"NUMPY\x01", b"NUMPY\x02"),
        ],
    )
    def test_other_containers_are_refused(self, data):
        content = adapter_content(ADAPTER)
        content["arrays"]["factors"] = Array("float32", (24,), "numpy.ndarray", data)
        with pytest.raises(RecordError, match="cannot be read: not npy bytes"):
            read_adapter(content)

    @pytest.mark.parametrize("shape", [(-4, -6), (-1, -24), (0, 2**62, 2**62), (1,) * 70 + (24,)])
    def test_impossible_shapes_are_refused(self, shape):
        content = adapter_content(AdapterArrays({}, {"w": counting(3, 8)}))
        data = content["arrays"]["head/w"].data[128:] if 0 not in shape else b""
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        header = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
        content["arrays"]["head/w"] = Array("float32", shape, "numpy.ndarray", header + data)
        with pytest.raises(RecordError, match="'head/w' cannot be read"):
            read_adapter(content)

    def test_large_arrays_are_no_copies_and_guard_the_message(self):
        content = adapter_content(ADAPTER)
        adapter = read_adapter(content)
        for array in (*adapter.modules["q.0"], adapter.head["bias"]):
            assert not array.flags.owndata
            with pytest.raises(ValueError, match="read-only"):
                array.fill(1)


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class TestHostileArrays:
    @pytest.mark.parametrize("declared", ["float32", "object"])
    def test_a_pickle_is_never_opened(self, tmp_path, declared):
        trap, file = tmp_path / "executed", io.BytesIO()
        np.save(file, np.array([Trap(trap)], dtype=object), allow_pickle=True)
        content = adapter_content(AdapterArrays({}))
        array = Array(declared, (1,), "numpy.ndarray", file.getvalue())
        content["arrays"]["factors"] = array

        with pytest.raises(RecordError, match="float32"):
            read_adapter(content)
        assert not trap.exists()

        np.load(io.BytesIO(file.getvalue()), allow_pickle=True)
        assert trap.exists()  # so it would have been executed

    @pytest.mark.parametrize("declared", [(24,), (2**33,), (2**20, 2**20)])
    @pytest.mark.parametrize("header", ["(24,)", "(8589934592,)", "(1048576, 1048576)"])
    def test_a_lie_about_the_shape_costs_no_memory(self, declared, header):
        content = adapter_content(AdapterArrays({}))
        array = Array("float32", declared, "numpy.ndarray", lying_npy(header)[:-4])
        content["arrays"]["factors"] = array
        tracemalloc.start()
        try:
            with pytest.raises(RecordError, match="cannot be read"):
                read_adapter(content)
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()


class TestCompressedText:
    @given(st.text())
    def test_survives(self, text):
        assert decompress(compress(text), 10**6) == text

    @settings(max_examples=300)
    @given(st.data())
    def test_damage_is_refused_or_read_within_the_limit(self, data):
        damaged = data.draw(damaged_bytes(compress('{"modules":["encoder.layer.0"]}' * 3)))
        try:
            assert len(decompress(damaged, 1000)) < 1000
        except CompressedTextError as error:
            assert "\n" not in str(error)

    @pytest.mark.parametrize("read", [read_adapter, read_plan])
    def test_a_bomb_is_not_expanded(self, read):
        bomb = compress.__wrapped__(" " * 50_000_000)  # nor cached
        assert len(bomb) < 50_000
        content = adapter_content(ADAPTER, plan=ConfigRecord({"plan": bomb}))
        content["layout"]["layout"] = bomb
        tracemalloc.start()
        try:
            with pytest.raises(RecordError, match="expands to 4194304 bytes or more"):
                read(content)
            assert tracemalloc.get_traced_memory()[1] < 20_000_000
        finally:
            tracemalloc.stop()

    def test_what_goes_on_behind_its_end_or_ends_early_is_refused(self):
        data = compress("layout")
        for wrong, why in ((data + b"x", "too late"), (data[:-1], "too early"), (b"", "too early")):
            with pytest.raises(CompressedTextError, match=why):
                decompress(wrong, 100)

    def test_as_much_as_the_limit_is_too_much(self):
        assert decompress(compress("x" * 99), 100) == "x" * 99
        with pytest.raises(CompressedTextError, match="100 bytes or more"):
            decompress(compress("x" * 100), 100)

    def test_bytes_that_are_no_text_are_refused(self):
        squeezer = zlib.compressobj()
        data = squeezer.compress(b"\xff\xfe") + squeezer.flush()
        with pytest.raises(CompressedTextError, match="no compressed text"):
            decompress(data, 100)


class TestContentBytes:
    def test_counts_what_a_content_holds(self):
        arrays = ArrayRecord({"w": Array("float32", (2, 3), "numpy.ndarray", b"x" * 1000)})
        values = ConfigRecord({"é": ["ab", "c"], "n": [1, 2, 3], "b": b"1234", "f": True, "e": []})
        content = RecordDict({"a": arrays, "c": values, "m": MetricRecord({"loss": 0.5})})

        array = 1 + 1000 + len("float32") + len("numpy.ndarray") + 2 * 8
        config = (2 + 3) + (1 + 24) + (1 + 4) + (1 + 8) + 1
        assert content_bytes(content) == array + config + (4 + 8)

    def test_is_close_to_what_travels(self):
        wide = AdapterArrays({"q": (counting(8, 384), counting(400, 8))}, {"w": counting(77, 384)})
        content = adapter_content(wide, plan=plan_record(PLAN))
        with server_identity():
            travels = message_bytes(Message(content, 1, MessageType.TRAIN))

        assert 0.95 * travels < content_bytes(content) <= travels


def places(value, path=()):
    """Every place in a JSON value, as a path of keys."""
    found, steps = [path] if path else [], []
    if isinstance(value, dict | list):
        steps = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in steps:
        found += places(item, (*path, key))
    return found


@st.composite
def damaged_plans(draw):
    values = json.loads(draw(st.sampled_from([PLAN, MIXED_PLAN, ONE_FACTOR_PLAN])).to_json())
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from(places(values)))
        parent = values
        for key in path:
            parent = parent[key]
        if draw(st.booleans()) or isinstance(parent, list):
            parent[last] = draw(json_values)
        else:
            del parent[last]
        if not places(values):
            break
    text = json.dumps(values)
    if draw(st.booleans()):
        text = draw(damaged_bytes(text.encode())).decode(errors="replace")
    return text


def rest_of(module):
    """Return the layout behind the names of a module with this plan."""
    factors = [] if module.factors == "both" else [module.factors]
    return [format_bits(module.bits)] * bool(module.bits) + factors


def check_plan(text):
    """Only a refusal in one line, or a plan with the very values of the text."""
    try:
        plan = read_plan(RecordDict({"plan": ConfigRecord({"plan": compress(text)})}))
    except RecordError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
        return
    values, again = json.loads(text), json.loads(plan.to_json())
    entries = values.pop("modules")
    again.pop("modules")
    assert {k: repr(v) for k, v in again.items()} == {k: repr(v) for k, v in values.items()}
    said = {
        name: (parse_indices(held), parse_indices(trained), repr(scaling), rest)
        for held, trained, scaling, names, *rest in entries
        for name in names
    }
    got = {n: (m.held, m.trainable, repr(m.scaling), rest_of(m)) for n, m in plan.modules.items()}
    assert got == said
    trained = [m for m in plan.modules.values() if m.trainable]
    assert all(bool(m.bits) == (plan.upload == "mixed") for m in trained)
    assert all(type(name) is str for name in got)
    assert plan.local_epochs >= 1 <= plan.max_steps + 1 <= plan.max_steps + plan.probe_batches + 1
    assert 0 <= plan.importance_smoothing < 1


class TestPlans:
    def test_what_is_not_damaged_passes_the_check(self):
        check_plan(PLAN.to_json())
        check_plan(MIXED_PLAN.to_json())
        check_plan(ONE_FACTOR_PLAN.to_json())

    @settings(max_examples=400)
    @given(damaged_plans())
    def test_damage_is_refused_or_read_as_it_is(self, text):
        check_plan(text)

    @pytest.mark.soak
    @SOAK
    @given(damaged_plans())
    def test_ten_thousand_damages_are_refused_or_read_as_they_are(self, text):
        check_plan(text)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"local_epochs": 0}, "local_epochs must be a whole number from 1, got 0"),
            ({"local_epochs": 1.0}, "local_epochs .* got 1.0"),
            ({"local_epochs": True}, "local_epochs .* got True"),
            (
                {"upload": "fp16"},
                "upload must be one of fp32, .*, sparse, got 'fp16'",
            ),
            ({"upload": None}, "upload must be one of"),
            ({"error_feedback": 1}, "error_feedback must be true or false, got 1"),
            ({"upload": "fp32"}, "error_feedback must be false with upload=fp32, got True"),
            ({"max_steps": -1}, "max_steps must be a whole number from 0, got -1"),
            ({"max_steps": None}, "max_steps .* got None"),
            ({"probe_batches": -2}, "probe_batches must be a whole number from 0, got -2"),
            ({"probe_batches": "3"}, "probe_batches .* got '3'"),
            ({"importance_smoothing": 1}, r"importance_smoothing must be in \[0, 1\), got 1"),
            ({"importance_smoothing": -0.1}, "importance_smoothing"),
            ({"importance_smoothing": math.nan}, "importance_smoothing .* got nan"),
            ({"tail": {}}, "TailPruning: keys missing or unknown"),
            ({"tail": False}, "TailPruning is bool"),
            ({"tail": 0}, "TailPruning is int"),
            ({"head": "frozen\nhead"}, "head must be one of"),
            ({"head": ["frozen"]}, "head must be one of"),
            ({"head": "frozen " * 999}, "head must be one of"),
            ({"odd\nkey": 1}, "TrainPlan: keys missing or unknown"),
        ],
    )
    def test_values_out_of_range_are_refused(self, change, message):
        values = json.loads(PLAN.to_json()) | change
        with pytest.raises(ValueError, match=f"^not a train plan: .*{message}") as caught:
            TrainPlan.from_json(json.dumps(values))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"decay": 1.5}, r"tail decay must be in \[0, 1\], got 1.5"),
            ({"decay": math.nan}, "tail decay"),
            ({"decay": True}, "tail decay"),
            ({"weight": -0.1}, "tail weight must be at least 0 and finite, got -0.1"),
            ({"weight": math.inf}, "tail weight"),
            ({"min_rank": -1}, "tail min_rank must be a whole number from 0, got -1"),
            ({"min_rank": 2.0}, "tail min_rank"),
            ({"prune": 1}, "tail prune must be true or false, got 1"),
        ],
    )
    def test_tails_out_of_range_are_refused(self, change, message):
        values = json.loads(PLAN.to_json())
        values["tail"] |= change
        with pytest.raises(ValueError, match=f"^not a train plan: {message}"):
            TrainPlan.from_json(json.dumps(values))

    @pytest.mark.parametrize("scaling", [math.inf, True, "1", 10**400])
    def test_a_scaling_that_is_no_finite_number_is_refused(self, scaling):
        values = json.loads(PLAN.to_json()) | {"modules": [["0", "0", scaling, ["q"]]]}
        with pytest.raises(ValueError, match="scaling must be above 0 and finite"):
            TrainPlan.from_json(json.dumps(values))

    @pytest.mark.parametrize(
        ("modules", "message"),
        [
            ([["0", "0", 1.0, ["q"]], ["0-1", "0", 1.0, ["q"]]], "module 'q' occurs twice"),
            ([["0", "0", 1.0, ["q", "q"]]], "module 'q' occurs twice"),
            ([["0", "0", 1.0, "qv"]], "module names 'qv', expected a list"),
            ([["0", "0", 1.0, [3]]], "module names"),
        ],
    )
    def test_module_names_that_are_not_plain_are_refused(self, modules, message):
        values = json.loads(PLAN.to_json()) | {"modules": modules}
        with pytest.raises(ValueError, match=message):
            TrainPlan.from_json(json.dumps(values))

    @pytest.mark.parametrize("key", sorted(json.loads(PLAN.to_json())))
    def test_no_key_has_a_silent_default(self, key):
        values = json.loads(PLAN.to_json())
        del values[key]
        with pytest.raises(ValueError, match=f"keys missing or unknown: .*{key}"):
            TrainPlan.from_json(json.dumps(values))

    @pytest.mark.parametrize(
        "held", ["0-99999", "0-9999999999", "999999", ",".join(["0-60000"] * 9)]
    )
    def test_few_characters_cannot_mean_many_components(self, held):
        values = json.loads(PLAN.to_json()) | {"modules": [[held, "0", 1.0, ["q"]]]}
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="component indices: "):
                TrainPlan.from_json(json.dumps(values))
            assert tracemalloc.get_traced_memory()[1] < 10_000_000
        finally:
            tracemalloc.stop()

    def test_json_nested_too_deep_is_refused(self):
        with pytest.raises(ValueError, match=r"not a train plan: .*recursion"):
            TrainPlan.from_json("[" * 100_000)


@st.composite
def damaged_profiles(draw):
    record = draw(st.sampled_from([NODE, OWN_DATA_NODE, UNNUMBERED_NODE])).to_record()
    for _ in range(draw(st.integers(1, 2))):
        key = draw(st.sampled_from(sorted(record)))
        if key == "rank-pattern" and draw(st.booleans()):
            record[key] = json.dumps(draw(json_values))
        elif draw(st.integers(0, 3)):
            record[key] = draw(scalars | lists)
        else:
            del record[key]
            record[draw(texts)] = draw(scalars)
    return record


def check_profile(record):
    """Only a refusal in one line, or a profile with the very values of the record."""
    with server_identity():
        reply = Message(RecordDict({PROFILE: record}), 1, MessageType.QUERY)
    try:
        profile = NodeProfile.from_reply(reply)
    except ValueError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 500
        return
    said = {key: repr(value) for key, value in record.items() if key != "rank-pattern"}
    got = {key: repr(value) for key, value in profile.to_record().items() if key in said}
    assert got == said
    assert profile.rank_pattern == json.loads(str(record.get("rank-pattern", "{}")))
    whole = (profile.partition_id, profile.num_partitions, profile.num_examples, *profile.ranks)
    assert all(type(number) is int for number in whole)
    assert min(profile.ranks) >= 1
    unnumbered = profile.own_data and not {"partition-id", "num-partitions"} & set(record)
    assert unnumbered or 0 <= profile.partition_id < profile.num_partitions
    assert not label_fault(profile.label_names)
    assert profile.num_examples >= 0
    assert type(profile.device) is str


class TestProfiles:
    def test_what_is_not_damaged_passes_the_check(self):
        check_profile(NODE.to_record())
        check_profile(OWN_DATA_NODE.to_record())
        check_profile(UNNUMBERED_NODE.to_record())

    @settings(max_examples=400)
    @given(damaged_profiles())
    def test_damage_is_refused_or_read_as_it_is(self, record):
        check_profile(record)

    @pytest.mark.soak
    @SOAK
    @given(damaged_profiles())
    def test_ten_thousand_damages_are_refused_or_read_as_they_are(self, record):
        check_profile(record)

    @pytest.mark.parametrize("pattern", ["[" * 100_000, json.dumps({"a{99999999999999}": 2})])
    def test_patterns_that_break_their_reader_are_refused(self, pattern):
        record = NODE.to_record()
        record["rank-pattern"] = pattern
        check_profile(record)
