"""Figures of a run's clients: scores by rank, ranks over rounds, and bytes."""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hafl_app.metrics import Metric
from hafl_app.printable import figure_text
from hafl_app.reports.client_scores import last_scores, worst_tenth
from hafl_app.reports.curve import MEGABYTE
from hafl_app.reports.figures import style
from hafl_app.reports.figures.curves import draw_band

_GOLDEN: Final = (5**0.5 - 1) / 2
_WIDTH: Final = 0.5  # of a rank's clients; ranks are 1 apart
# Column of a share to its label, color and hatch.
_SHARES: Final = {
    "examples": ("of the examples", style.COLORS[6], ""),
    "components": ("of examples times components", style.COLORS[3], "..."),
    "influence": ("of the adapter's step", style.COLORS[2], "///"),
}
_WORST: Final = "worst tenth"
_PANELS_IN_A_ROW: Final = 3


def scores_by_rank(runs: Mapping[str, pd.DataFrame], metric: Metric, title: str) -> Figure:
    """Draw each client's last score over its rank, the worst tenth marked, and both means.

    Parameters
    ----------
    runs
        Name of a panel to the scores of one or several runs, see `hafl_app.reports.runs.Run`;
        none of them empty.
    """
    figure, panels = _panels(len(runs), title)
    for axes, (name, scores) in zip(panels, runs.items(), strict=True):
        _draw_scores(axes, last_scores(scores), metric)
        axes.set_title(figure_text(name))
    panels[0].set_ylabel(f"clients' {metric.title}")
    style.legend_below(figure, *panels)
    return figure


def _draw_scores(axes: Axes, last: pd.DataFrame, metric: Metric) -> None:
    worst = worst_tenth(last, metric)
    ranks = sorted({int(rank) for rank in last["rank"]})
    # Clients of one rank side by side, always in the same places: the golden ratio spreads them.
    beside = _WIDTH * ((np.arange(len(last)) * _GOLDEN) % 1 - 0.5)
    places = pd.Series([ranks.index(int(rank)) for rank in last["rank"]] + beside, last.index)
    for rows, color, marker, label in (
        (last.drop(worst.index), style.COLORS[1], "o", "client"),
        (worst, style.COLORS[2], "v", _WORST),
    ):
        axes.scatter(
            places[rows.index], rows[metric.name], color=color, marker=marker, s=26, label=label
        )
    for value, dashes, name in (
        (last[metric.name].mean(), "-", "mean"),
        (worst[metric.name].mean(), ":", f"mean of the {_WORST}"),
    ):
        axes.axhline(value, color=style.COLORS[0], linestyle=dashes, lw=1, label=name, zorder=1)
    style.plain(axes)
    if metric.is_share:
        style.percent(axes.yaxis)
    axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set(xlim=(-0.5, len(ranks) - 0.5), xlabel="rank of the client")


def ranks_over_rounds(runs: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Draw the ranks that clients trained by round: a line a budget, its band over the clients.

    Parameters
    ----------
    runs
        Name of a panel to the ranks of a run, see `hafl_app.reports.client_scores.ranks_trained`;
        none of them empty.
    """
    figure, panels = _panels(len(runs), title)
    budgets = sorted({int(rank) for frame in runs.values() for rank in frame["rank"]})
    for axes, (name, frame) in zip(panels, runs.items(), strict=True):
        style.plain(axes)
        for budget, rows in frame.groupby("rank"):
            trained = rows.groupby("server_round")["rank_trained"].agg(["min", "mean", "max"])
            place = budgets.index(int(str(budget)))
            draw_band(axes, trained, f"budget {budget}", place)
        style.whole(axes.xaxis)
        axes.set(xlabel="round", title=figure_text(name), ylim=(0, None))
    panels[0].set_ylabel("rank trained, mean over layers")
    style.legend_below(figure, *panels)
    return figure


def bytes_by_client(runs: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Draw the MB that training sent to each client and from it, clients in order of rank.

    Parameters
    ----------
    runs
        Name of a panel to the trainings of a run, see `hafl_app.reports.runs.Run`; none empty.
    """
    figure, panels = _panels(len(runs), title)
    for axes, (name, clients) in zip(panels, runs.items(), strict=True):
        total = clients.groupby("partition_id").agg(
            rank=("rank", "max"), down=("bytes_down", "sum"), up=("bytes_up", "sum")
        )
        total = total.sort_values("rank", kind="stable")
        places = np.arange(len(total))
        below = np.zeros(len(total))
        for column, color, hatch in (("down", style.COLORS[6], ""), ("up", style.COLORS[1], "///")):
            sent = total[column].to_numpy(dtype=float) / MEGABYTE
            axes.bar(
                places, sent, bottom=below, color=color, hatch=hatch, edgecolor="white", lw=0.3,
                label=column,
            )  # fmt: skip
            below += sent
        names = [f"{i} (r{rank})" for i, rank in zip(total.index, total["rank"], strict=True)]
        axes.set_xticks(*style.thinned(names, 24), rotation=90, fontsize=7)
        axes.set(xlabel="client (rank)", title=figure_text(name))
        style.plain(axes)
        axes.grid(visible=False, axis="x")
    panels[0].set_ylabel("MB, all trainings")
    style.legend_below(figure, *panels)
    return figure


def influence_by_rank(runs: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Draw how much of the adapter's step the clients of a rank decide, beside their data.

    Parameters
    ----------
    runs
        Name of a panel to the influences of a run, see `hafl_app.reports.runs.Run`; none empty.
    """
    figure, panels = _panels(len(runs), title)
    width = 0.8 / len(_SHARES)
    for axes, (name, frame) in zip(panels, runs.items(), strict=True):
        by_round = frame.groupby(["rank", "server_round"])[[*_SHARES]].sum().groupby("rank")
        mean, low, high = by_round.mean(), by_round.min(), by_round.max()
        places = np.arange(len(mean))
        for number, (column, (label, color, hatch)) in enumerate(_SHARES.items()):
            xs = places + (number - (len(_SHARES) - 1) / 2) * width
            axes.bar(
                xs, mean[column], width, color=color, hatch=hatch, edgecolor="white", lw=0.3,
                label=label,
            )  # fmt: skip
            axes.vlines(xs, low[column], high[column], color=style.COLORS[0], lw=1)
        style.plain(axes)
        axes.grid(visible=False, axis="x")
        axes.axhline(0, color=style.COLORS[0], lw=0.8)
        style.percent(axes.yaxis)
        axes.set_xticks(places, [str(rank) for rank in mean.index])
        axes.set(xlabel="rank of the client", title=figure_text(name))
    panels[0].set_ylabel("share")
    style.legend_below(figure, *panels)
    return figure


def _panels(count: int, title: str) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure with as many panels, which share their vertical axis."""
    columns = min(count, _PANELS_IN_A_ROW)
    rows = -(-count // columns)
    figure = style.new_figure(title, max(6.0, 4.2 * columns), 0.9 + 3.6 * rows)
    grid = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid[:count]
