"""Heat maps of a run: its clients' classes, and the importance of its components."""

import math
import re
from typing import Final

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hafl_app.reports.figures import style

_MOST_LAYERS: Final = 12
_LAYERS_IN_A_ROW: Final = 4
_LAYER: Final = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def labels_by_client(labels: pd.DataFrame, title: str) -> Figure:
    """Draw the training rows of each class on each client, as known before training.

    By seaborn itself: `flwr_datasets.visualization` counts the rows of its own partitioners, so
    before validation and held-out rows are split off, and draws with pyplot in red and green.

    Parameters
    ----------
    labels
        Classes by clients, not empty.
    """
    rows, columns = labels.shape
    figure = style.new_figure(title, _within(2 + 0.28 * columns, 5, 14), _within(0.17 * rows, 3, 9))
    axes = figure.subplots()
    sns.heatmap(
        labels, ax=axes, cmap=style.HEAT, rasterized=True, xticklabels=False, yticklabels=False,
        cbar_kws={"label": "training rows", "ticks": MaxNLocator(integer=True)},
    )  # fmt: skip
    _name_ticks(axes, labels)
    axes.set(xlabel="client", ylabel="class")
    return figure


def importance_over_rounds(importance: pd.DataFrame, title: str) -> Figure:
    """Draw the importance of each component by round, a panel for each layer.

    In each round the shares of all components of the model add up to one; a layer's modules are
    summed up. Of more than twelve layers every so-manieth is drawn.

    Parameters
    ----------
    importance
        See `hafl_app.reports.runs.Run`, not empty.
    """
    shares = importance_shares(importance)
    layers = list(dict.fromkeys(shares["layer"]))
    drawn = layers[:: math.ceil(len(layers) / _MOST_LAYERS)]
    left_out = f" ({len(drawn)} of {len(layers)} layers)" if len(drawn) < len(layers) else ""
    columns = min(len(drawn), _LAYERS_IN_A_ROW)
    rows = -(-len(drawn) // columns)
    figure = style.new_figure(title + left_out, max(6, 3.4 * columns), 0.9 + 2.8 * rows)
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    scale = Normalize(0, shares["share"].max())
    for axes, layer in zip(grid, drawn, strict=False):
        table = shares[shares["layer"] == layer].pivot(
            index="component", columns="server_round", values="share"
        )
        sns.heatmap(
            table, ax=axes, cmap=style.HEAT, norm=scale, cbar=False, rasterized=True,
            xticklabels=False, yticklabels=False,
        )  # fmt: skip
        axes.set_facecolor("0.85")  # where nothing was measured
        _name_ticks(axes, table, 12)
        axes.set(xlabel="round", ylabel="component", title=f"layer {layer}" if layer else "")
        axes.label_outer()
    for axes in grid[len(drawn) :]:
        axes.set_axis_off()
    measure = importance["measure"].iloc[-1]
    bar = figure.colorbar(
        grid[0].collections[0], ax=grid, label=f"share of the importance ({measure})"
    )
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: style.percent_text(value)))
    return figure


def importance_shares(importance: pd.DataFrame) -> pd.DataFrame:
    """Return ``share`` of each round, layer and component, in the round's whole importance.

    Returns
    -------
    DataFrame
        ``server_round``, ``layer`` (the first number in the modules' names, empty without one),
        ``component``, ``share``; NaN where nothing was measured.
    """
    layered = importance.assign(layer=importance["module"].map(layer_of))
    keys = ["server_round", "layer", "component"]
    # min_count: a sum of nothing measured is not known.
    summed = layered.groupby(keys, sort=False)["importance"].sum(min_count=1).reset_index()
    total = summed.groupby("server_round")["importance"].transform("sum")
    summed["share"] = summed["importance"] / total.where(total > 0)
    return summed.drop(columns="importance")


def layer_of(module: str) -> str:
    """Return the number of a module's layer, as its name has it; empty without one."""
    found = _LAYER.search(module)
    return found[1] if found else ""


def _name_ticks(axes: Axes, table: pd.DataFrame, most: int = 40) -> None:
    """Name the rows and columns of a heat map, as many as are readable."""
    for axis, names in ((axes.xaxis, table.columns), (axes.yaxis, table.index)):
        places, shown = style.thinned(list(names), most)
        axis.set_ticks([place + 0.5 for place in places], labels=shown, fontsize=7)
    axes.tick_params(axis="y", rotation=0)


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
