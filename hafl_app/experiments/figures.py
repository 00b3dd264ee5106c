"""Several methods in one picture: mean lines with the range of the seeds as a band."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hafl_app.experiments.results import Curve
from hafl_app.metrics import ACCURACY
from hafl_app.printable import figure_text

# Okabe and Ito's colors, distinct for the color-blind; with a marker each, distinct in gray too.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_SEEDS_FOR_A_BAND = 2


@dataclass(frozen=True)
class Line:
    """Line of a panel: its points, and one value for each point and seed."""

    xs: Sequence[float]
    values: Sequence[Sequence[float]]  # (seeds, points)


def draw_comparison(
    cells: Mapping[str, Mapping[str, Sequence[Curve]]], path: Path, title: str
) -> None:
    """Draw the test score by round and by MB sent, one row of panels a cell, into a PNG.

    Parameters
    ----------
    cells
        Cell to method to the curves of its seeds. Methods without a curve get no line.
    """
    figure = Figure(figsize=(11, 0.9 + 3.6 * len(cells)), layout="constrained")
    figure.suptitle(figure_text(title), fontsize=13)
    panels = figure.subplots(len(cells), 2, sharey="row", squeeze=False)
    methods = list(dict.fromkeys(method for lines in cells.values() for method in lines))
    for (by_round, by_traffic), (cell, lines) in zip(panels, cells.items(), strict=True):
        known = {method: curves for method, curves in lines.items() if curves}
        scores = {m: [curve.test for curve in curves] for m, curves in known.items()}
        metric = next((curve.metric for curves in known.values() for curve in curves), ACCURACY)
        rounds = {m: Line(range(len(each[0])), each) for m, each in scores.items()}
        sent = {
            m: Line(np.mean([curve.sent for curve in known[m]], axis=0).tolist(), each)
            for m, each in scores.items()
        }
        draw_lines(by_round, rounds, methods, percent=metric.is_share)
        draw_lines(by_traffic, sent, methods, percent=metric.is_share)
        by_round.xaxis.set_major_locator(MaxNLocator(integer=True))
        by_round.set(xlabel="round", ylabel=f"test {metric.title}", title=figure_text(cell))
        by_traffic.set(xlabel="sent so far, down and up (MB)", title=figure_text(cell))
        by_traffic.tick_params(labelleft=True)
    save(figure, panels[0][0], path)


def draw_shares(lines: Mapping[str, Line], path: Path, title: str, ylabel: str) -> None:
    """Draw shares in [0, 1] by round, from round 1, into a PNG."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set_title(figure_text(title), fontsize=12)
    draw_lines(axes, lines, list(lines))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="round", ylabel=ylabel)
    axes.set_ylim(bottom=0)
    save(figure, axes, path)


def draw_lines(
    axes: Axes, lines: Mapping[str, Line], order: Sequence[str], *, percent: bool = True
) -> None:
    """Draw a mean line a method, and a band from the lowest to the highest seed.

    A point that a seed does not know is left out.

    Parameters
    ----------
    order
        All methods of the figure; a method's place decides its color and marker.
    percent
        Whether the values are shares in [0, 1], to be written in percent.
    """
    for method, line in lines.items():
        place = order.index(method)
        color, marker = _COLORS[place % len(_COLORS)], _MARKERS[place % len(_MARKERS)]
        values = np.asarray(line.values, dtype=float)  # (seeds, points)
        known = np.isfinite(values).all(axis=0)
        xs, values = np.asarray(line.xs)[known], values[:, known]
        axes.plot(
            xs,
            values.mean(axis=0),
            color=color,
            marker=marker,
            markersize=4,
            linestyle="-" if place < len(_COLORS) else "--",
            label=figure_text(method),
        )
        if len(values) >= _SEEDS_FOR_A_BAND:
            axes.fill_between(
                xs, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, lw=0
            )
    axes.spines[["top", "right"]].set_visible(False)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.grid(color="0.9")


def save(figure: Figure, with_lines: Axes, path: Path) -> None:
    """Add one legend below the panels and write the PNG; its folder is made."""
    handles, labels = with_lines.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)
