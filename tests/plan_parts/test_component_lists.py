import pytest
from hypothesis import given
from hypothesis import strategies as st

from hafl_app.plan_parts.component_lists import (
    BIT_LEVELS,
    format_bits,
    format_indices,
    parse_bits,
    parse_indices,
)


class TestIndices:
    @pytest.mark.parametrize(
        ("indices", "text"),
        [
            ((), ""),
            ((4,), "4"),
            ((0, 1, 2, 5), "0-2,5"),
            ((7, 3, 4), "7,3-4"),
            ((2, 1, 0), "2,1,0"),  # only ascending runs are written short
        ],
    )
    def test_are_written_compactly(self, indices, text):
        assert format_indices(indices) == text
        assert parse_indices(text) == indices

    @given(st.lists(st.integers(0, 60), max_size=30).map(tuple))
    def test_survive_writing_and_reading(self, indices):
        assert parse_indices(format_indices(indices)) == indices

    @pytest.mark.parametrize("text", ["a", "1,", "-1", "1-", "1-x", "4-2", "1,,2", "1.5"])
    def test_other_text_is_refused(self, text):
        with pytest.raises(ValueError, match=r"."):
            parse_indices(text)


class TestBits:
    @pytest.mark.parametrize(
        ("bits", "text"),
        [((), ""), ((8,), "8"), ((16, 16, 8, 0), "16x2,8,0"), ((2,) * 12, "2x12")],
    )
    def test_are_written_as_run_lengths(self, bits, text):
        assert format_bits(bits) == text
        assert parse_bits(text) == bits

    @given(st.lists(st.sampled_from(BIT_LEVELS), max_size=30).map(tuple))
    def test_survive_writing_and_reading(self, bits):
        assert parse_bits(format_bits(bits)) == bits

    @pytest.mark.parametrize(
        "text", ["3", "8x0", "8x1", "8,8", "8x2,8", "08", "8x", "x2", "-8", "8 ", "8,", "2x99999"]
    )
    def test_other_text_is_refused(self, text):
        with pytest.raises(ValueError, match="bits: "):
            parse_bits(text)
