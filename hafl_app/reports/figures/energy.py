"""Energy of adapters by singular value: how many components a global update really has."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from hafl_app.reports.figures import style
from hafl_app.reports.figures.curves import draw_band

_SMALLEST = 1e-6  # share that is still drawn


def energy_by_value(runs: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Draw the share of the update's squared norm in each singular value, the mean over modules.

    The band goes from the module with the smallest share to that with the largest. Shares below
    a millionth are drawn as one.

    Parameters
    ----------
    runs
        Name of a line to the energies, see `hafl_app.reports.spectra.read_energy`; none empty.
    """
    figure = style.new_figure(title, 7, 4.6)
    axes = figure.subplots()
    style.plain(axes)
    for place, (name, frame) in enumerate(runs.items()):
        by_value = frame.dropna().groupby("value")["energy"].agg(["min", "mean", "max"])
        draw_band(axes, by_value.clip(lower=_SMALLEST), name, place)
    axes.set_yscale("log")
    axes.set_ylim(_SMALLEST, 1.5)
    style.percent(axes.yaxis)
    style.whole(axes.xaxis)
    axes.set(xlabel="singular value", ylabel="share of the energy")
    style.legend_below(figure, axes)
    return figure
