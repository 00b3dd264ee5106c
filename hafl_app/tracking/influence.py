"""Who decides the adapter's step: the clients' influence by rank, as numbers and as a figure."""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from hafl_app.printable import figure_text
from hafl_app.tracking.base import RoundRecord
from hafl_app.tracking.jsonl import METRICS_FILE, read_history

# Okabe and Ito's colors, distinct for the color-blind.
_BARS = {
    "examples": ("of the examples", "#56B4E9"),
    "components": ("of examples x components", "#009E73"),
    "influence": ("of the adapter's step", "#D55E00"),
}
_WIDTH = 0.26


@dataclass(frozen=True)
class RankShares:
    """Shares of all clients of one rank, means over the rounds.

    Attributes
    ----------
    rank, clients
        Their rank, and how many take part in a round.
    examples, components, influence
        Share of the examples, of examples times trained components, and of the adapter's step. The
        influences of all ranks sum to 1, and one may be below 0.
    lowest, highest
        Influence in the rounds where it is least and most.
    """

    rank: int
    clients: float
    examples: float
    components: float
    influence: float
    lowest: float
    highest: float


def by_rank(rounds: Sequence[RoundRecord]) -> list[RankShares]:
    """Return the shares of every rank that occurs, ascending; empty if none is recorded."""
    recorded = [record.influence for record in rounds if record.influence]
    rows = []
    for rank in sorted({int(one["rank"]) for clients in recorded for one in clients}):
        groups = [[one for one in clients if one["rank"] == rank] for clients in recorded]
        sums = {name: [sum(one[name] for one in few) for few in groups] for name in _BARS}
        means = {name: statistics.fmean(values) for name, values in sums.items()}
        low, high = min(sums["influence"]), max(sums["influence"])
        count = statistics.fmean(map(len, groups))
        rows.append(RankShares(rank, count, **means, lowest=low, highest=high))
    return rows


def influence_of_run(folder: Path) -> list[RoundRecord]:
    """Return the rounds of a run's folder in which influence is recorded.

    Raises
    ------
    ValueError
        In one line, if there is none, or the folder has no readable records.
    """
    try:
        history = read_history(folder, sys.maxsize)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no readable {METRICS_FILE}: {error}") from error
    found = [record for record in history.rounds if record.influence]
    if not found:
        raise ValueError(
            f"{folder}: no round has a record of influence: its method has none, or "
            "privacy=central_dp or federation.robust hide it"
        )
    return found


def draw_influence(rounds: Sequence[RoundRecord], path: Path, title: str) -> bool:
    """Draw the shares of every rank into a PNG; a line spans the rounds from lowest to highest.

    Returns
    -------
    bool
        False if there is nothing to draw: no influence is recorded, or all clients have one rank.
    """
    rows = by_rank(rounds)
    if len(rows) < 2:
        return False
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_title(figure_text(title), fontsize=11)
    for place, (name, (label, color)) in enumerate(_BARS.items()):
        xs = [x + (place - 1) * _WIDTH for x in range(len(rows))]
        heights = [getattr(row, name) for row in rows]
        axes.bar(xs, heights, _WIDTH, color=color, label=label)
        if name == "influence":
            axes.vlines(xs, [r.lowest for r in rows], [r.highest for r in rows], color="0.2")
    names = [f"rank {row.rank}\n{row.clients:g} clients" for row in rows]
    axes.set_xticks(range(len(rows)), names)
    axes.set(ylabel="share")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.axhline(0, color="0.2", linewidth=0.8)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)
    return True
