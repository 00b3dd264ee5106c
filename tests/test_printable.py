"""Foreign text on a terminal: one line, no control characters, cut."""

import ast
import io

import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from rich.console import Console

from hafl_app.printable import (
    figure_text,
    markdown_code,
    markdown_text,
    printable,
    python_text,
)
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


NASTY = (
    "a|b",
    "`code`",
    "``` fence",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "![x](http://a.b/c.png)",
    "<http://a.b>",
    "one\ntwo\n\n---\n\n# title",
    "---\nlicense: mit\n---",
    "**bold** _italic_ ~~gone~~",
    "$x^2$ $",
    "&lt;b&gt; & more",
    "\\| \\` \\",
    "\x1b[2J\x1b]0;pwned\x07",
    "a\u202eb",
    "| --- | --- |",
    "__init__ and snake_case",
)


def tokens_of(text):
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    for token in parser.parse(text):
        yield token
        yield from token.children or ()


@pytest.mark.parametrize("text", NASTY)
class TestMarkdown:
    def test_text_is_shown_as_it_is(self, text):
        tokens = list(tokens_of(f"Of {markdown_text(text)}."))

        assert {t.type for t in tokens} <= {
            *("paragraph_open", "inline", "text", "text_special", "paragraph_close")
        }
        shown = "".join(t.content for t in tokens if t.type in {"text", "text_special"})
        assert shown == f"Of {printable(text)}."

    def test_a_cell_stays_a_cell(self, text):
        table = f"| a | b |\n| --- | --- |\n| {markdown_text(text)} | last |\n\nBehind.\n"
        tokens = list(tokens_of(table))

        assert [t.type for t in tokens].count("td_open") == 2
        cell = tokens[[t.type for t in tokens].index("td_open") + 1]
        assert "".join(child.content for child in cell.children) == printable(text)
        assert {child.type for child in cell.children} <= {"text", "text_special"}

    def test_code_is_one_span(self, text):
        tokens = list(tokens_of(f"- command: {markdown_code(text)}"))

        (code,) = [t for t in tokens if t.type == "code_inline"]
        assert code.content == printable(text)
        assert not {"html_inline", "link_open", "image"} & {t.type for t in tokens}

    def test_python_reads_it_back(self, text):
        literal = python_text(text)

        assert ast.literal_eval(literal) == text
        assert literal.isprintable()
        assert literal[0] == literal[-1] == '"'
        assert "```" not in literal

    def test_a_figure_draws_it(self, text):
        figure = Figure()
        figure.suptitle(figure_text(text))

        figure.savefig(io.BytesIO(), format="svg")


def test_a_bare_address_becomes_no_link():
    assert markdown_text("https://a.b and www.a.b") == "https\\://a.b and www\\.a.b"


@pytest.mark.parametrize("text", ["it's", 'a "quote"', 'it\'s a "quote"', "\ud800", "'", '"', ""])
def test_python_reads_quotes_back(text):
    assert ast.literal_eval(python_text(text)) == text
