"""Numbers in words, and lines of at most 80 columns."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, TextIO

from rich import box, get_console
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH: Final = 80
"""Columns of the longest line."""

MEGABYTE: Final = 1e6
INDENT: Final = "  "
_PLAIN: Final = Console(width=WIDTH, color_system=None)  # rich wraps text for a console
# A rule of ASCII dashes under the header and nothing else, so that a log keeps it as it is.
_HEADER_RULE = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


class Printer:
    """Prints lines and tables that no terminal of 80 columns breaks.

    Parameters
    ----------
    console
        Where to print; None is standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or standard_output()

    def line(self, text: str = "", style: str = "", indent: str = INDENT) -> None:
        """Print a line; a long one goes on below, indented, so that its start is its own."""
        for piece in wrapped(text, indent) or [""]:
            self._print(Text(piece, style=style))

    def marked(self, mark: Text, text: str, indent: str) -> None:
        """Print a styled word and a line behind it, which goes on below, indented."""
        first, *rest = wrapped(f"{mark.plain}  {text}", indent)
        self._print(mark.copy().append(first[len(mark.plain) :], style="default"))
        for piece in rest:
            self._print(Text(piece))

    def parts(self, parts: Iterable[Text]) -> None:
        """Print parts beside each other, as many as fit, and the others below."""
        for line in fitted([part for part in parts if part.plain]):
            self._print(line)

    def block(self, text: Text, indent: str = INDENT) -> None:
        """Print styled text of several lines, indented; long ones go on below."""
        for line in text.split("\n", allow_blank=True):
            for piece in line.wrap(_PLAIN, WIDTH - len(indent), overflow="fold") or [Text()]:
                self._print(Text(indent if piece.plain else "").append_text(piece))

    def path(self, text: str) -> None:
        """Print a line with a path or a command, which is whole however long it is."""
        self._print(Text(text))

    def table(
        self, title: str, columns: Mapping[str, str], rows: Sequence[Sequence[str | Text]]
    ) -> None:
        """Print a table under its title.

        Parameters
        ----------
        columns
            Heading to ``left`` or ``right``.
        rows
            Cells as text: what a node calls itself is no markup of ours.
        """
        table = Table(box=_HEADER_RULE, show_edge=False, pad_edge=False, header_style="bold")
        for name, justify in columns.items():
            table.add_column(Text(name), justify="left" if justify == "left" else "right")
        for row in rows:
            table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
        self.line()
        self.line(title, "bold")
        self._console.print(table, highlight=False, width=WIDTH)

    def _print(self, line: Text) -> None:
        # Soft wrap: what is longer than the terminal is so on purpose.
        self._console.print(line, soft_wrap=True, highlight=False)


def standard_output() -> Console:
    """Return the console that all of a process prints to, 80 columns wide where it is a file.

    On a terminal it is rich's own, the only one that leaves a line alone which moves below.
    """
    console = get_console()
    return console if console.is_terminal else Console(width=WIDTH)


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream ends in a terminal, also while rich stands between."""
    return bool(getattr(stream, "rich_proxied_file", stream).isatty())


def wrapped(text: str, indent: str = INDENT) -> list[str]:
    """Return a line as pieces of at most `WIDTH` columns, all but the first indented."""
    line = Text(" ".join(text.splitlines()))
    if line.cell_len <= WIDTH:
        return [line.plain.rstrip()] if line.plain.strip() else []
    first = line.wrap(_PLAIN, WIDTH, overflow="fold")[0]
    rest = line[len(first) :].wrap(_PLAIN, WIDTH - len(indent), overflow="fold")
    pieces = [first.plain.rstrip(), *(indent + piece.plain.strip() for piece in rest)]
    return [piece for piece in pieces if piece.strip()]


def fitted(parts: Sequence[Text]) -> list[Text]:
    """Join parts by two spaces to lines of at most `WIDTH` columns, all but the first indented."""
    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + len(INDENT) + part.cell_len <= WIDTH:
            lines[-1].append(INDENT).append_text(part)
            continue
        indent = INDENT if lines else ""
        pieces = wrapped(indent + part.plain)
        lines += [Text(piece, style=part.style) for piece in pieces]
    return lines


def percent(value: float | None) -> str:
    """Share as a percentage with one decimal; ``-`` if it is unknown."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.1%}"


def points(value: float | None) -> Text:
    """Difference of two shares in percentage points, signed, green above 0 and red below."""
    if value is None or not math.isfinite(value):
        return Text("-")
    return _signed(round(100 * value, 1), 1)


def gained(value: float | None) -> Text:
    """Gain of any metric, signed, green above 0 and red below."""
    if value is None or not math.isfinite(value):
        return Text("-")
    return _signed(round(value, 2), 2)


def _signed(rounded: float, decimals: int) -> Text:
    if rounded == 0:
        return Text(f"{0:.{decimals}f}")
    return Text(f"{rounded:+.{decimals}f}", style="green" if rounded > 0 else "red")


def megabytes(count: float) -> str:
    """Bytes in MB of 10^6 bytes, with three significant digits."""
    size = count / MEGABYTE
    if count == 0:
        return "0 MB"
    if size < 0.001:
        return "<0.001 MB"
    decimals = max(0, min(3, 2 - math.floor(math.log10(size))))
    return f"{size:,.{decimals}f} MB"


def duration(seconds: float) -> str:
    """Seconds in words with two units at most, e.g. ``1 min 05 s``."""
    if round(seconds, 1) < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def short_duration(seconds: float) -> str:
    """Seconds in at most six characters as far as a day goes, e.g. ``1m05s``."""
    return duration(seconds).replace(" min", "m").replace(" ", "")
