"""The run as one picture: its score by round, and by what was sent to get there."""

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hafl_app.metrics import Metric, task_of
from hafl_app.printable import figure_text
from hafl_app.tracking.base import RoundRecord

MEGABYTE = 1e6
ROUNDS_WITH_MARKERS = 30
SMALLEST_SPAN = 0.02  # of the axis, so that noise is not drawn as a trend; relative if no share

# Phase: (color, marker). Okabe and Ito's colors, distinct for the color-blind.
_LINES = {"validation": ("#0072B2", "o"), "test": ("#D55E00", "s"), "clients": ("#009E73", "^")}


def draw_curves(rounds: Sequence[RoundRecord], path: Path, title: str) -> None:
    """Draw the task's primary metric against rounds, and against cumulative traffic, into a PNG.

    A score that a round lacks leaves that round out of its line; one that no round has gets no
    line.

    Parameters
    ----------
    rounds
        Any number of rounds, in any order.
    path
        The PNG; its folder is made when it is not there.
    title
        Above both panels.
    """
    ordered = sorted(rounds, key=lambda record: record.server_round)
    sent = [(record.bytes_down + record.bytes_up) / MEGABYTE for record in ordered]
    # A figure of its own, outside pyplot, needs no display and leaves no global state.
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_round, by_traffic = figure.subplots(1, 2, sharey=True)

    figure.suptitle(figure_text(title), fontsize=13)
    by_round.xaxis.set_major_locator(MaxNLocator(integer=True))
    metric = task_of({name for record in ordered for name in record.metrics}).primary
    _draw_panel(by_round, [record.server_round for record in ordered], ordered, metric)
    _draw_panel(by_traffic, list(accumulate(sent)), ordered, metric)
    by_round.set(xlabel="round", ylabel=metric.title)
    by_traffic.set(xlabel="sent so far, down and up (MB)")
    by_traffic.tick_params(labelleft=True)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)


def _draw_panel(
    axes: Axes, positions: Sequence[float], rounds: Sequence[RoundRecord], metric: Metric
) -> None:
    """Draw a line a phase; `positions` holds the x of each round."""
    marked = len(rounds) <= ROUNDS_WITH_MARKERS
    for phase, (color, marker) in _LINES.items():
        values = [record.metrics.get(metric.key(phase), math.nan) for record in rounds]
        known = [(x, y) for x, y in zip(positions, values, strict=True) if math.isfinite(y)]
        if known:
            xs, ys = zip(*known, strict=True)
            style = marker if marked or len(known) == 1 else None
            axes.plot(xs, ys, color=color, marker=style, markersize=4.5, label=phase)
    axes.spines[["top", "right"]].set_visible(False)
    if metric.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    if not axes.lines:
        axes.set(xticks=[], yticks=[])
        axes.text(
            0.5, 0.5, f"no {metric.title} was recorded", ha="center", transform=axes.transAxes
        )
        return
    axes.grid(color="0.9")
    axes.legend(frameon=False)
    if len(set(positions)) == 1:  # a scale around one point would show MB below zero
        axes.set_xticks(positions[:1])
    low, high = axes.get_ylim()
    smallest = SMALLEST_SPAN * (1 if metric.is_share else abs(high + low) / 2)
    spare = max(0.0, smallest - (high - low)) / 2
    axes.set_ylim(low - spare, high + spare)
