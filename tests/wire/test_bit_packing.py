"""Packed codes: every vector survives, every other byte is refused."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st

from hafl_app.plan_parts.number_formats import component_bytes, largest_code
from hafl_app.wire.arrays import RecordError
from hafl_app.wire.bit_packing import (
    pack_pairs,
    packed_size,
    read_bits,
    read_packed,
    unpack_pairs,
    write_packed,
)

SIZES = {"query": (7, 5), "dense": (6, 9)}  # never square
bits_of_module = st.lists(st.sampled_from([2, 4, 8, 16]), max_size=4).map(tuple)


def codes_for(bits, seed):
    generator = np.random.default_rng(seed)
    pairs = {}
    for name, (height, width) in SIZES.items():
        limits = np.array([largest_code(b) for b in bits[name]], np.int64).reshape(-1, 1)
        rows = [
            generator.integers(-limits, limits, (len(limits), n), endpoint=True).astype(np.int16)
            for n in (width, height)
        ]
        pairs[name] = (rows[0], rows[1].T)
    return pairs


def layout(bits):
    return {
        "modules": list(bits),
        "ranks": [len(b) for b in bits.values()],
        "out-features": [SIZES[n][0] for n in bits],
        "in-features": [SIZES[n][1] for n in bits],
    }


@given(bits_of_module, bits_of_module, st.integers(0, 2**32 - 1))
def test_codes_survive_in_as_many_bytes_as_planned(query, dense, seed):
    bits = {"query": query, "dense": dense}
    pairs = codes_for(bits, seed)

    data = pack_pairs(pairs, bits)

    scales = 4 * (len(query) + len(dense))
    planned = sum(component_bytes(b, *SIZES[n]) for n in bits for b in bits[n])
    assert data.dtype == np.uint8
    assert len(data) == planned - scales
    got = unpack_pairs(layout(bits), bits, read_packed(ArrayRecord({"f": write_packed(data)}), "f"))
    for name, (lora_A, lora_B) in pairs.items():
        assert got[name][0].dtype == got[name][1].dtype == np.int16
        assert np.array_equal(got[name][0], lora_A)
        assert np.array_equal(got[name][1], lora_B)


def test_the_first_code_is_in_the_lowest_bits():
    pairs = {"dense": (np.array([[1, 0, -1, 1, -1]], np.int16), np.array([[7]], np.int16))}
    assert pack_pairs(pairs, {"dense": (4,)}).tolist() == [0x78, 0x86, 0x06, 0x0E]
    two = {"dense": (np.array([[1, 0, -1, 1, -1]], np.int16), np.zeros((0, 1), np.int16))}
    assert pack_pairs(two, {"dense": (2,)}).tolist() == [0b10_00_01_10, 0b00]


GIVEN = {"query": (4, 2), "dense": (16, 8, 2)}


class TestRefusals:
    def data(self):
        return pack_pairs(codes_for(GIVEN, 1), GIVEN)

    @pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: np.append(d, np.uint8(0))])
    def test_another_number_of_bytes(self, change):
        with pytest.raises(RecordError, match=r"factors: \d+ bytes, the layout says 61"):
            unpack_pairs(layout(GIVEN), GIVEN, change(self.data()))

    @pytest.mark.parametrize(
        ("at", "byte", "message"),
        [
            (0, 0xF0, "code 8 of 4 bits, expected -7 to 7"),
            (3, 0b11, "code 2 of 2 bits, expected -1 to 1"),
            (2, 0xE0, "bits behind the last of 5 codes"),  # fills up the byte
            (30, 0xFF, "code 128 of 8 bits, expected -127 to 127"),
        ],
    )
    def test_codes_out_of_range_and_bits_behind_the_last(self, at, byte, message):
        data = np.zeros(61, np.uint8)
        unpack_pairs(layout(GIVEN), GIVEN, data)
        data[at] |= byte
        with pytest.raises(RecordError, match=message):
            unpack_pairs(layout(GIVEN), GIVEN, data)

    def test_the_one_word_of_sixteen_bits_that_means_nothing(self):
        bits = {"query": (16,)}
        with pytest.raises(RecordError, match="code 32768 of 16 bits, expected -32767 to 32767"):
            unpack_pairs(layout(bits), bits, np.full(24, 0xFF, np.uint8))

    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            (["4,2"], "no list of texts for 2 modules"),
            ("4,2", "no list of texts"),
            (None, "no list of texts"),
            (["4,2", 3], "bits '3' of 3 components"),
            (["4,2", "16,8"], "bits '16,8' of 3 components"),
            (["4,0", "16,8,2"], "bits '4,0' of 2 components, none of them 0"),
            (["4,2", "16,8,3"], "'3' is not like '8' or '8x3'"),
            (["4x1,2", "16,8,2"], "'4x1,2' is '4,2' written otherwise"),
            (["4,2", "8,8x2"], "'8,8x2' is '8x3' written otherwise"),
            (["2x99999", "16,8,2"], "more than 65536"),
        ],
    )
    def test_bits_of_another_form(self, texts, message):
        with pytest.raises(RecordError, match=message) as caught:
            read_bits(layout(GIVEN) | {"bits": texts}, "bits")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (None, "'f' is missing, expected uint8"),
            (Array("int8", (3,), "raw", b"abc"), "'f' is of dtype 'int8' as 'raw', expected uint8"),
            (Array("uint8", (3,), "npy", b"abc"), "expected uint8 as 'raw'"),
            (Array("uint8", (4,), "raw", b"abc"), r"3 bytes for shape \(4,\)"),
            (Array("uint8", (3, 1), "raw", b"abc"), r"3 bytes for shape \(3, 1\)"),
        ],
    )
    def test_arrays_of_another_kind(self, array, message):
        with pytest.raises(RecordError, match=message):
            read_packed(ArrayRecord({} if array is None else {"f": array}), "f")


@pytest.mark.parametrize(
    ("bits", "length", "size"), [(2, 5, 2), (2, 4, 1), (4, 5, 3), (8, 5, 5), (16, 5, 10)]
)
def test_a_vector_ends_at_a_whole_byte(bits, length, size):
    assert packed_size(bits, length) == size
