"""Figures of the page as SVG, drawn on the server: the page needs no library and no network."""

import io
import math
import statistics
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hafl_app.dashboard.folders import MEGABYTE
from hafl_app.dashboard.records import Importance
from hafl_app.dashboard.runs import Run
from hafl_app.printable import figure_text
from hafl_app.reports.figures import style
from hafl_app.reports.figures.curves import SENT, Line, draw_lines
from hafl_app.tracking.base import ClientRecord

_LONGEST_NAME = 60
_MOST_ROWS = 40  # of a heat map; more clients are drawn by rank
_LOCK = threading.Lock()  # Matplotlib's settings are those of the process


@dataclass(frozen=True)
class Quantity:
    """A value of a client's training that a heat map shows by client and round."""

    title: str
    of: Callable[[ClientRecord], float]


QUANTITIES: Final[Mapping[str, Quantity]] = {
    "components": Quantity("rank-one components trained", lambda r: r.components_trained),
    "loss": Quantity("training loss", lambda r: r.loss),
    "seconds": Quantity("seconds of training", lambda r: r.seconds),
    "uploaded": Quantity("MB uploaded", lambda r: r.bytes_up / MEGABYTE),
    "failures": Quantity("failed trainings", lambda r: float(bool(r.error))),
}


def curves(runs: Mapping[str, Run], phase: str) -> bytes:
    """Draw the score of runs by round and by MB, as lines over each other.

    Parameters
    ----------
    runs
        By the name in the legend. Those with another metric than the first are left out.
    phase
        ``test``, ``validation`` or ``clients``.
    """
    with _LOCK, _style():
        figure = Figure(figsize=(10, 3.9), layout="constrained")
        by_round, by_traffic = figure.subplots(1, 2, sharey=True)
        metric = next(iter(runs.values())).metric
        shown = {n: run for n, run in runs.items() if run.metric == metric and run.rounds}
        legend = {n: _short(n) for n in shown}
        rounds = {
            legend[n]: Line([r.server_round for r in run.rounds], [run.scores(phase)])
            for n, run in shown.items()
        }
        sent = {legend[n]: Line(_sent(run), [run.scores(phase)]) for n, run in shown.items()}
        for axes, lines in ((by_round, rounds), (by_traffic, sent)):
            draw_lines(axes, lines, list(legend.values()), metric)
        style.whole(by_round.xaxis)
        by_round.set(xlabel="round", ylabel=f"{phase} {metric.title}")
        by_traffic.set(xlabel=SENT)
        by_traffic.tick_params(labelleft=True)
        handles, labels = by_round.get_legend_handles_labels()
        if handles:
            columns = 1 if len(labels) > 4 or max(map(len, labels)) > 30 else len(labels)
            figure.set_figheight(3.9 + 0.22 * math.ceil(len(labels) / columns))
            figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        return _svg(figure)


def client_heat_map(trainings: Sequence[ClientRecord], quantity: str) -> bytes:
    """Draw a value by client, or by rank where there are many clients, and round.

    A client that did not train in a round leaves its cell white.

    Parameters
    ----------
    quantity
        A key of `QUANTITIES`.
    """
    chosen = QUANTITIES[quantity]
    by_rank = len({record.partition_id for record in trainings}) > _MOST_ROWS
    cells: dict[tuple[int, int], list[float]] = defaultdict(list)
    ranks: dict[int, int] = {}
    for record in trainings:
        row = record.rank if by_rank else record.partition_id
        ranks[row] = record.rank
        cells[row, record.server_round].append(chosen.of(record))
    rows = sorted(ranks)
    rounds = sorted({server_round for _, server_round in cells})
    values = np.full((len(rows), len(rounds)), np.nan)
    for (row, server_round), each in cells.items():
        known = [value for value in each if math.isfinite(value)]
        if known:
            mean = statistics.fmean(known)
            values[rows.index(row), rounds.index(server_round)] = mean
    names = [f"rank {r}" if by_rank else f"client {r} (rank {ranks[r]})" for r in rows]
    mean_of = ", mean of a rank" if by_rank else ""
    return _heat_map(values, names, [str(r) for r in rounds], "round", f"{chosen.title}{mean_of}")


def importance_heat_map(importance: Importance) -> bytes:
    """Draw the importance of each component by module, after one round."""
    modules = importance.modules
    widest = max(map(len, modules.values()), default=0)
    values = np.full((len(modules), widest), np.nan)
    for row, each in enumerate(modules.values()):
        values[row, : len(each)] = each
    title = f"importance ({importance.measure}) after round {importance.server_round}"
    columns = [str(component) for component in range(1, widest + 1)]
    return _heat_map(values, list(map(_short, modules)), columns, "component", title)


def _style() -> AbstractContextManager[None]:
    """Set Matplotlib to write text as text, in the reader's font."""
    return mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10})


def _short(name: str) -> str:
    """Return a run's or a module's name, its end if it is long."""
    if len(name) > _LONGEST_NAME:
        return f"...{name[-_LONGEST_NAME:]}"
    # Matplotlib would leave a label that starts with an underscore out of the legend.
    return f"./{name}" if name.startswith("_") else name


def _sent(run: Run) -> list[float]:
    return list(accumulate((r.bytes_down + r.bytes_up) / MEGABYTE for r in run.rounds))


def _heat_map(
    values: "np.ndarray[tuple[int, int], np.dtype[np.float64]]",
    rows: Sequence[str],
    columns: Sequence[str],
    xlabel: str,
    title: str,
) -> bytes:
    with _LOCK, _style():
        figure = Figure(figsize=(10, 1.3 + 0.24 * max(3, len(rows))), layout="constrained")
        axes = figure.subplots()
        axes.set_title(figure_text(title), fontsize=11)
        image = axes.imshow(values, aspect="auto", cmap=style.HEAT, interpolation="nearest")
        figure.colorbar(image, ax=axes)
        axes.set_yticks(range(len(rows)), list(map(figure_text, rows)))
        _label_columns(axes, columns)
        axes.set_xlabel(xlabel)
        return _svg(figure)


def _label_columns(axes: Axes, columns: Sequence[str]) -> None:
    step = max(1, math.ceil(len(columns) / 25))
    axes.set_xticks(range(0, len(columns), step), columns[::step])


def _svg(figure: Figure) -> bytes:
    written = io.BytesIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()
