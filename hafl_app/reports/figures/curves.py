"""Curves: scores by round, by traffic and by simulated time, of one run or of several methods."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hafl_app.metrics import ACCURACY, Metric, task_of
from hafl_app.printable import figure_text
from hafl_app.reports.curve import MEGABYTE, Curve
from hafl_app.reports.figures import style
from hafl_app.tracking.base import RoundRecord

PHASES: Final = ("validation", "test", "clients")
SENT: Final = "sent so far, down and up (MB)"
SIMULATED_TIME: Final = "simulated time so far (s)"
_POINTS_WITH_MARKERS = 30
_SMALLEST_SPAN = 0.02  # of the axis, so that noise is not drawn as a trend; relative if no share


@dataclass(frozen=True)
class Line:
    """Line of a panel: its points, and one value for each point and seed.

    Parameters
    ----------
    xs
        Places of the points.
    values
        Shape (seeds, points); NaN where a seed does not know one.
    """

    xs: Sequence[float]
    values: Sequence[Sequence[float]]

    def known(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return places and values of the points that all seeds know."""
        values = np.atleast_2d(np.asarray(self.values, dtype=float))
        known = np.isfinite(values).all(axis=0)
        return np.asarray(self.xs, dtype=float)[known], values[:, known]


@dataclass(frozen=True)
class Row:
    """Panels of one row: the same lines over each of several axes.

    Parameters
    ----------
    title
        Above each panel.
    metric
        Of all values.
    ylabel
        Left of the first panel.
    panels
        Label of an axis to the lines over it, by name.
    """

    title: str
    metric: Metric
    ylabel: str
    panels: Mapping[str, Mapping[str, Line]] = field(default_factory=dict)


def draw_curves(rounds: Sequence[RoundRecord], path: Path, title: str) -> None:
    """Draw a run's primary metric by round, and by what was sent to get there.

    A score that a round lacks leaves that round out of its line; one that no round has gets no
    line.

    Parameters
    ----------
    rounds
        Any number of rounds, in any order.
    path
        A PNG, SVG or PDF; its folder is made when it is not there.
    """
    ordered = sorted(rounds, key=lambda record: record.server_round)
    metric = task_of({name for record in ordered for name in record.metrics}).primary
    places = {
        "round": [float(record.server_round) for record in ordered],
        SENT: list(accumulate((r.bytes_down + r.bytes_up) / MEGABYTE for r in ordered)),
    }
    values = {
        phase: [[record.metrics.get(metric.key(phase), math.nan) for record in ordered]]
        for phase in PHASES
    }
    panels = {
        axis: {phase: Line(xs, values[phase]) for phase in PHASES} for axis, xs in places.items()
    }
    style.save(figure_of([Row("", metric, metric.title, panels)], PHASES, title), path)


def draw_comparison(
    cells: Mapping[str, Mapping[str, Sequence[Curve]]], path: Path, title: str
) -> None:
    """Draw the test score by round, by MB and by simulated time, one row of panels a cell.

    Parameters
    ----------
    cells
        Cell to method to the curves of its seeds. Methods without a curve get no line.
    path
        A PNG, SVG or PDF; its folder is made when it is not there.
    """
    style.save(comparison_figure(cells, title), path)


def comparison_figure(cells: Mapping[str, Mapping[str, Sequence[Curve]]], title: str) -> Figure:
    """Return the figure of `draw_comparison`.

    Simulated time has a panel where any curve knows it.
    """
    rows = [row_of(cell, methods) for cell, methods in cells.items()]
    order = list(dict.fromkeys(method for methods in cells.values() for method in methods))
    return figure_of(rows, order, title)


def row_of(title: str, methods: Mapping[str, Sequence[Curve]]) -> Row:
    """Return the panels of several methods' curves, each the mean over its seeds.

    The scores are those on test data, or on validation data where more rounds know those.
    """
    known = {method: _as_long(curves) for method, curves in methods.items() if curves}
    every = [curve for curves in known.values() for curve in curves]
    metric = every[0].metric if every else ACCURACY
    phase = max(("test", "validation"), key=lambda name: _least_known(every, name))
    lines: dict[str, dict[str, Line]] = {"round": {}, SENT: {}, SIMULATED_TIME: {}}
    for method, curves in known.items():
        scores = [getattr(curve, phase) for curve in curves]
        lines["round"][method] = Line(range(len(scores[0])), scores)
        lines[SENT][method] = Line(_mean([curve.sent for curve in curves]), scores)
        if all(math.isfinite(curve.simulated_seconds) for curve in curves):
            seconds = _mean([curve.simulated for curve in curves])
            lines[SIMULATED_TIME][method] = Line(seconds, scores)
    if not lines[SIMULATED_TIME]:
        del lines[SIMULATED_TIME]
    return Row(title, metric, f"{phase} {metric.title}", lines)


def figure_of(rows: Sequence[Row], order: Sequence[str], title: str) -> Figure:
    """Return a figure of rows of panels with one legend.

    Parameters
    ----------
    order
        Names of all lines of the figure; the place decides color, marker and dashes.
    """
    columns = max(len(row.panels) for row in rows)
    figure = style.new_figure(title, 5.5 * columns, 0.9 + 3.6 * len(rows))
    grid = figure.subplots(len(rows), columns, sharey="row", squeeze=False)
    for panels, row in zip(grid, rows, strict=True):
        for axes, (xlabel, lines) in zip(panels, row.panels.items(), strict=False):
            if xlabel == "round":
                style.whole(axes.xaxis)
            draw_lines(axes, lines, order, row.metric)
            axes.set(xlabel=xlabel, title=figure_text(row.title))
            axes.tick_params(labelleft=True)
        for axes in panels[len(row.panels) :]:
            axes.set_axis_off()
        panels[0].set_ylabel(row.ylabel)
    style.legend_below(figure, *grid.flat)
    return figure


def draw_shares(lines: Mapping[str, Line], path: Path, title: str, ylabel: str) -> None:
    """Draw shares in [0, 1] by round, from round 1."""
    figure = style.new_figure(title, 7, 4.6)
    axes = figure.subplots()
    draw_lines(axes, lines, list(lines), ACCURACY)
    style.whole(axes.xaxis)
    axes.set(xlabel="round", ylabel=ylabel)
    axes.set_ylim(bottom=0)
    style.legend_below(figure, axes)
    style.save(figure, path)


def draw_lines(axes: Axes, lines: Mapping[str, Line], order: Sequence[str], metric: Metric) -> None:
    """Draw a mean line each, and a band from the lowest to the highest seed.

    A point that a seed does not know is left out; a line without a point is not drawn.

    Parameters
    ----------
    order
        All lines of the figure, see `figure_of`.
    metric
        Of the values; shares are written in percent.
    """
    style.plain(axes)
    places: set[float] = set()
    for name, line in lines.items():
        xs, values = line.known()
        if not len(xs):
            continue
        places |= set(xs.tolist())
        draw_line(axes, xs, values, name, order.index(name))
    if metric.is_share:
        style.percent(axes.yaxis)
    if not axes.lines:
        axes.grid(visible=False)
        axes.set(xticks=[], yticks=[])
        text = f"no {metric.title} was recorded"
        axes.text(0.5, 0.5, text, ha="center", transform=axes.transAxes)
        return
    if len(places) == 1:  # a scale around one point would show MB below zero
        axes.set_xticks([*places])
    low, high = axes.get_ylim()
    smallest = _SMALLEST_SPAN * (1 if metric.is_share else abs(high + low) / 2)
    spare = max(0.0, smallest - (high - low)) / 2
    axes.set_ylim(low - spare, high + spare)


def draw_line(
    axes: Axes,
    xs: npt.NDArray[np.float64],
    values: npt.NDArray[np.float64],
    name: str,
    place: int,
) -> None:
    """Draw one line and its band; `values` has shape (seeds, points)."""
    color = style.COLORS[place % len(style.COLORS)]
    # Beyond the seven colors none comes with the same marker, nor a marker with the same dashes.
    shift = place // len(style.COLORS)
    marked = len(xs) <= _POINTS_WITH_MARKERS
    axes.plot(
        xs,
        values.mean(axis=0),
        color=color,
        marker=style.MARKERS[(place + shift) % len(style.MARKERS)] if marked else None,
        markersize=4.5,
        linestyle=style.DASHES[(place + 2 * shift) % len(style.DASHES)],
        label=figure_text(name),
    )
    if len(values) > 1:
        axes.fill_between(xs, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, lw=0)


def draw_band(axes: Axes, bands: pd.DataFrame, name: str, place: int) -> None:
    """Draw a line of means, and a band around it.

    Parameters
    ----------
    bands
        Columns ``min``, ``mean`` and ``max``, indexed by the places of the points.
    place
        Decides color, marker and dashes.
    """
    xs = bands.index.to_numpy(dtype=float)
    draw_line(axes, xs, bands["mean"].to_numpy(dtype=float)[None], name, place)
    color = axes.lines[-1].get_color()
    axes.fill_between(xs, bands["min"], bands["max"], color=color, alpha=0.15, lw=0)


def _as_long(curves: Sequence[Curve]) -> list[Curve]:
    """Return the curves that are as long as the longest: others ended before their last round."""
    longest = max(len(curve.test) for curve in curves)
    return [curve for curve in curves if len(curve.test) == longest]


def _least_known(curves: Sequence[Curve], phase: str) -> int:
    """Return how many rounds' scores the curve knows that knows fewest."""
    counts = (sum(map(math.isfinite, getattr(curve, phase))) for curve in curves)
    return min(counts, default=0)


def _mean(values: Sequence[Sequence[float]]) -> list[float]:
    means: list[float] = np.mean(values, axis=0).tolist()
    return means
