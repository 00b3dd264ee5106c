"""Tables of text: one description, written as Markdown, HTML or LaTeX."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from hafl_app.metrics import Metric
from hafl_app.printable import markdown_text, printable
from hafl_app.reports.statistics import Paired, Spread

NONE: Final = "-"
_NARROWEST: Final = 3  # column of Markdown
_LATEX: Final = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
    }
)


@dataclass(frozen=True)
class Table:
    """Table of text; the first column names its rows, the others are numbers.

    Parameters
    ----------
    title
        What it shows; empty where the text around it says so.
    columns
        Headings.
    rows
        As many cells as there are headings, as they are: what writes them escapes them.
    note
        What a reader must know to read it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @classmethod
    def of(cls, title: str, lines: Sequence[Mapping[str, str]], note: str = "") -> "Table":
        """Return a table of lines by column, the columns of the first."""
        columns = list(lines[0])
        return cls(title, columns, [[line[name] for name in columns] for line in lines], note)

    def markdown(self) -> str:
        """Return a table whose columns line up in a terminal too."""
        lines = [[markdown_text(text) for text in line] for line in (self.columns, *self.rows)]
        widths = [max(_NARROWEST, *map(len, column)) for column in zip(*lines, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines.insert(1, rule)
        return "\n".join(f"| {' | '.join(_aligned(line, widths))} |" for line in lines)


def latex_text(text: object) -> str:
    """Return text that LaTeX prints as it is, on one line."""
    return printable(text).translate(_LATEX)


def score(spread: Spread, metric: Metric) -> str:
    """Return mean and deviation of a metric: shares in percent, others with two decimals.

    For example ``81.2 ± 0.4``; ``-`` if there is none.
    """
    factor, decimals = _scale(metric)
    if not math.isfinite(spread.mean):
        return NONE
    deviation = f" ± {factor * spread.sd:.{decimals}f}" if math.isfinite(spread.sd) else ""
    return f"{factor * spread.mean:.{decimals}f}{deviation}"


def size(value: float) -> str:
    """Return a number with three significant digits or whole; ``-`` if there is none."""
    if not math.isfinite(value):
        return NONE
    decimals = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{min(decimals, 3)}f}"


def difference_cells(paired: Paired, metric: Metric) -> list[str]:
    """Return mean, interval and number of paired differences as cells.

    In percentage points for shares; of one pair there is no interval.
    """
    factor, decimals = _scale(metric)

    def signed(value: float) -> str:
        return f"{factor * value:+.{decimals}f}"

    if not paired.each:
        return [NONE, NONE, "0"]
    ends = paired.interval
    interval = f"{signed(ends[0])} to {signed(ends[1])}" if ends else "none (n = 1)"
    return [signed(paired.mean), interval, str(len(paired.each))]


def difference_text(paired: Paired, metric: Metric) -> str:
    """Return the cells of paired differences as one: ``+1.2 (-0.3 to +2.7), 3``; ``-`` of none."""
    mean, interval, pairs = difference_cells(paired, metric)
    return f"{mean} ({interval}), {pairs}" if paired.interval else mean


def _scale(metric: Metric) -> tuple[int, int]:
    """Return the factor and the decimals of a metric's values."""
    return (100, 1) if metric.is_share else (1, 2)


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    cells = zip(line[1:], widths[1:], strict=True)
    return [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in cells)]
