"""Foreign text on a terminal: one line, no control characters, cut."""

import io

import pytest
from rich.console import Console

from hafl_app.printable import printable
from hafl_app.tracking.base import ClientRow
from hafl_app.tracking.console import ConsoleTracker


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain words", "plain words"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x1b]0;pwned\x07", "\\x1b]0;pwned\\x07"),
        ("first\nsecond\r\nthird", "first second third"),
        ("a\u202eb", "a\\u202eb"),
        ("a\u2028b", "a b"),
        ("caf\u00e9 \u4f60\u597d", "caf\u00e9 \u4f60\u597d"),
        ("\ud800", "\\ud800"),
        ("", ""),
    ],
)
def test_controls_are_shown_as_text(text, shown):
    assert printable(text) == shown


def test_long_text_is_cut_without_reading_all_of_it():
    assert printable("x" * 3_000_000, 40) == "x" * 37 + "..."
    assert printable("\n" * 3_000_000 + "forged", 40) == "..."


@pytest.mark.parametrize("name", ["[/x]", "[red]", "\x1b[2J", "a\nb"])
def test_a_device_of_any_name_can_be_listed(name):
    out = io.StringIO()
    tracker = ConsoleTracker(Console(file=out, width=120), num_rounds=1)

    tracker.start({}, [ClientRow(0, 1, 2, 10, name)])

    assert printable(name) in out.getvalue()
    assert "\x1b" not in out.getvalue()
