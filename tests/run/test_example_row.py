"""A training row is printed with what does not count dimmed, and moves no cursor."""

import io

import numpy as np
import pytest
from rich.console import Console

from hafl_app.data.text import EncodedText
from hafl_app.run.example_row import print_example

WORDS = ["", "<user>\n", "hi\x1b[2J", "<end>\n", "<bot>", " hello", "<end>", "w" * 900]


def decode(tokens):
    return "".join(WORDS[token] for token in tokens)


def row(tokens, counts):
    return EncodedText(
        np.array([*tokens, 7], np.int32),
        np.array([0, len(tokens), len(tokens) + 1]),
        np.zeros(2, np.int64),
        np.array([*counts, True], dtype=bool),
        np.zeros(2, bool),
    )


ROW = row([1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 1, 1])


def printed(rows, **how):
    out = io.StringIO()
    print_example(rows, decode, Console(file=out, width=200, **how))
    return out.getvalue()


def test_what_counts_is_plain_and_the_rest_dim_on_a_terminal():
    shown = printed(ROW, force_terminal=True, color_system="standard")
    assert "2 of 6 tokens count, the rest is dimmed" in shown
    assert "\x1b[2m<bot>\x1b[0m hello<end>\n" in shown
    assert "\x1b[2mhi\\x1b[2J<end>" in shown  # written, not done


def test_what_counts_stands_between_marks_in_a_file():
    assert printed(ROW, color_system=None).splitlines() == [
        "A training row: 2 of 6 tokens count, what counts stands in [[ ]]",
        "  <user>",
        "  hi\\x1b[2J<end>",
        "  <bot>[[ hello<end>]]",
    ]


@pytest.mark.parametrize(("counts", "left_out"), [(0, 552), (1, 540)])
def test_a_long_piece_loses_its_middle(counts, left_out):
    shown = printed(row([1, 7, 4], [0, counts, 0]), color_system=None)
    assert f" {left_out} characters" in " ".join(shown.split())
    assert len(shown) < 700
    assert max(map(len, shown.splitlines())) <= 80
