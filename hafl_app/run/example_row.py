"""One training row as the model reads it, with what does not count in the loss dimmed."""

import itertools
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.text import Text

from hafl_app.data.text import EncodedText
from hafl_app.tracking.as_text import Printer, standard_output

_LONGEST_RUN = 400  # characters of a piece that is shown whole
_SHOWN_AT_ENDS = 180
_MARKS = ("[[", "]]")  # around what counts, where nothing can be dimmed


def print_example(
    rows: EncodedText, decode: Callable[[list[int]], str], console: Console | None = None
) -> None:
    """Print the first of some rows.

    Parameters
    ----------
    rows
        At least one, with a loss mask.
    decode
        From token ids to text, special tokens included.
    console
        Where to print; None for standard output.
    """
    console = console or standard_output()
    printer = Printer(console)
    assert rows.loss_mask is not None
    mask = rows.loss_mask[: rows.offsets[1]]
    dims = console.color_system is not None
    others = "the rest is dimmed" if dims else f"what counts stands in {_MARKS[0]} {_MARKS[1]}"
    printer.line(f"A training row: {mask.sum():,} of {len(mask):,} tokens count, {others}")
    shown = Text()
    for counts, tokens in _runs(rows.row(0).tolist(), mask.tolist()):
        text = _shortened(decode(tokens))
        if counts and not dims:
            text = text.join(_MARKS)
        shown.append(text, style="" if counts else "dim")
    shown.rstrip()
    printer.block(shown)


def _runs(tokens: list[int], mask: list[bool]) -> Iterator[tuple[bool, list[int]]]:
    pairs = zip(mask, tokens, strict=True)
    for counts, run in itertools.groupby(pairs, key=lambda pair: pair[0]):
        yield counts, [token for _, token in run]


def _shortened(text: str) -> str:
    """Return a text that a terminal shows as what it is, without its middle if it is long."""
    if len(text) > _LONGEST_RUN:
        left_out = len(text) - 2 * _SHOWN_AT_ENDS
        middle = f" ... {left_out:,} characters ... "
        text = f"{text[:_SHOWN_AT_ENDS]}{middle}{text[-_SHOWN_AT_ENDS:]}"
    return "".join(one if one == "\n" or one.isprintable() else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    return " " if character == "\t" else character.encode("unicode_escape").decode()
