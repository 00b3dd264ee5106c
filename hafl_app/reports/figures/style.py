"""The style of all figures: colors with markers and dashes, percent ticks, files.

Every line has a marker and a dash pattern of its own beside its color, and heat maps go from dark
to light, so that nothing is lost in gray.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hafl_app.disk import naming
from hafl_app.printable import figure_text

# Okabe and Ito's colors, distinct for the color-blind, from dark to light.
COLORS: Final = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
DASHES: Final = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (6, 3)))
HEAT: Final = "cividis"  # dark to light, also for the color-blind
GRID: Final = "0.9"
FORMATS: Final = (".png", ".svg", ".pdf")

_MOST_TICKS = 40
_CHARACTERS_IN_AN_INCH = 13  # of a legend
# Nothing in a file but the figure: no date, which would differ, and no address.
_METADATA: Final = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def new_figure(title: str, width: float, height: float) -> Figure:
    """Return an empty figure; outside pyplot, it needs no display and leaves no global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(figure_text(title), fontsize=13)
    return figure


def plain(axes: Axes) -> None:
    """Leave out what carries nothing, and add a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)


def percent(axis: Axis) -> None:
    """Write the ticks of an axis of shares in percent, alike in every figure."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: percent_text(value)))


def percent_text(value: float) -> str:
    """Return a share as a tick shows it: ``20%``, ``2.5%``, ``0.001%``."""
    return f"{round(100 * value, 6):.5g}%"


def whole(axis: Axis) -> None:
    """Set ticks at whole numbers alone."""
    axis.set_major_locator(MaxNLocator(integer=True))


def thinned(names: Sequence[object], most: int = _MOST_TICKS) -> tuple[list[int], list[str]]:
    """Return places and names of the ticks for many rows or columns, evenly thinned."""
    step = max(1, int(np.ceil(len(names) / most)))
    places = list(range(0, len(names), step))
    return places, [figure_text(names[place], 40) for place in places]


def legend_below(figure: Figure, *axes: Axes) -> None:
    """Add one legend of these panels' lines below all panels."""
    found = {
        label: handle
        for its in axes
        for handle, label in zip(*its.get_legend_handles_labels(), strict=True)
    }
    if found:
        fit = figure.get_figwidth() * _CHARACTERS_IN_AN_INCH / (max(map(len, found)) + 8)
        columns = min(max(1, int(fit)), len(found))
        figure.legend(
            found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False
        )


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, SVG or PDF, by the suffix of its name; its folder is made.

    The same figure is the same file.

    Raises
    ------
    ValueError
        If the suffix is another.
    """
    check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        write_figure(figure, path, path.suffix.lower()[1:])


def write_figure(figure: Figure, target: Path | IO[bytes], format_name: str) -> None:
    """Write a figure as ``png``, ``svg`` or ``pdf``; its letters are a part of it."""
    with mpl.rc_context({"svg.hashsalt": "hafl", "svg.fonttype": "path"}):
        figure.savefig(target, format=format_name, dpi=150, metadata=_METADATA[format_name])


def check_format(path: Path) -> None:
    """Refuse a file name whose suffix is none of `FORMATS`."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(FORMATS)}")
