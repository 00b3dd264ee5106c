"""Single figures of runs that a user names: `hafl plots KIND RUN...`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import pandas as pd
from matplotlib.figure import Figure

from hafl_app.reports.figures.clients import (
    bytes_by_client,
    influence_by_rank,
    ranks_over_rounds,
    scores_by_rank,
)
from hafl_app.reports.figures.energy import energy_by_value
from hafl_app.reports.figures.heat_maps import importance_over_rounds, labels_by_client
from hafl_app.reports.pictures import trained_ranks
from hafl_app.reports.records import UnreadableRunError
from hafl_app.reports.runs import Run, read_run
from hafl_app.reports.spectra import read_energy

Runs = Mapping[str, Run]

_NO_SCORES = (
    "no client scored its slice: federation.fraction_evaluate and dataset.holdout_fraction must be "
    "above 0"
)
_NO_INFLUENCE = (
    "no round has a record of influence: its method has none, or privacy=central_dp or "
    "federation.robust hides it"
)
_NO_IMPORTANCE = "no importance was recorded, as in a run of an earlier version"


def figure_of_runs(kind: str, folders: Sequence[Path]) -> Figure:
    """Read runs and draw one figure of them.

    Parameters
    ----------
    kind
        One of `KINDS`.
    folders
        At least one.

    Raises
    ------
    ValueError
        In one line, if a folder cannot be read, or lacks what the figure shows.
    """
    runs = {str(folder): read_run(folder) for folder in folders}
    return KINDS[kind](runs)


def _labels(runs: Runs) -> Figure:
    [(name, frame)] = _one(runs, lambda run: run.labels, "the nodes' classes are not known").items()
    return labels_by_client(frame, name)


def _clients(runs: Runs) -> Figure:
    metrics = {run.curve.metric for run in runs.values()}
    if len(metrics) > 1:
        titles = ", ".join(sorted(metric.title for metric in metrics))
        raise ValueError(f"expected runs of one task; theirs are scored by {titles}")
    (metric,) = metrics
    frames = _known(runs, lambda run: run.scores, _NO_SCORES)
    return scores_by_rank(frames, metric, f"Clients' {metric.title}")


def _importance(runs: Runs) -> Figure:
    [(name, frame)] = _one(runs, lambda run: run.importance, _NO_IMPORTANCE).items()
    return importance_over_rounds(frame, name)


def _ranks(runs: Runs) -> Figure:
    frames = _known(runs, trained_ranks, _NO_IMPORTANCE)
    return ranks_over_rounds(frames, "Ranks that clients trained")


def _influence(runs: Runs) -> Figure:
    frames = _known(runs, lambda run: run.influence, _NO_INFLUENCE)
    return influence_by_rank(frames, "Who decides the adapter's step")


def _energy(runs: Runs) -> Figure:
    frames = _known(runs, lambda run: read_energy(run.folder), "no adapter was saved")
    return energy_by_value(frames, "Energy by singular value")


def _bytes(runs: Runs) -> Figure:
    frames = _known(runs, lambda run: run.clients, "no client trained")
    return bytes_by_client(frames, "Bytes by client")


KINDS: Final[Mapping[str, Callable[[Runs], Figure]]] = {
    "labels": _labels,
    "clients": _clients,
    "importance": _importance,
    "ranks": _ranks,
    "influence": _influence,
    "energy": _energy,
    "bytes": _bytes,
}


def _known(
    runs: Runs, frame_of: Callable[[Run], pd.DataFrame], why_empty: str
) -> dict[str, pd.DataFrame]:
    """Return the frame of each run; a run without one is an error."""
    frames = {}
    for name, run in runs.items():
        frames[name] = frame_of(run)
        if frames[name].empty:
            raise UnreadableRunError(f"{name}: {why_empty}")
    return frames


def _one(
    runs: Runs, frame_of: Callable[[Run], pd.DataFrame], why_empty: str
) -> dict[str, pd.DataFrame]:
    """Return the frame of the only run."""
    if len(runs) > 1:
        raise ValueError(f"expected one run, got {len(runs)}: {', '.join(runs)}")
    return _known(runs, frame_of, why_empty)
