"""Pictures of a report: curves, clients, ranks, energies, bytes, classes and importance."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import pandas as pd
from matplotlib.figure import Figure

from hafl_app.reports.client_scores import ranks_trained
from hafl_app.reports.figures.clients import (
    bytes_by_client,
    influence_by_rank,
    ranks_over_rounds,
    scores_by_rank,
)
from hafl_app.reports.figures.curves import SIMULATED_TIME, figure_of, row_of
from hafl_app.reports.figures.energy import energy_by_value
from hafl_app.reports.figures.heat_maps import importance_over_rounds, labels_by_client
from hafl_app.reports.groups import Group, Section
from hafl_app.reports.records import UnreadableRunError
from hafl_app.reports.runs import Run
from hafl_app.reports.spectra import read_energy

_MOST: Final = 6  # groups with a panel, or a figure, of their own

Frames = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class Picture:
    """Figure of a report.

    Parameters
    ----------
    name
        Of its file, without suffix.
    caption
        What it shows, in words.
    figure
        As drawn.
    """

    name: str
    caption: str
    figure: Figure


def pictures_of(section: Section, missing: list[str]) -> list[Picture]:
    """Return the figures of a section.

    Parameters
    ----------
    missing
        Gets a line for each figure, or part of one, that is left out.
    """
    some = section.groups[:_MOST]
    if len(some) < len(section.groups):
        missing.append(
            f"Figures with a panel for each show the first {_MOST} of {len(section.groups)}."
        )
    return [
        _curves(section, missing),
        *_of_clients(section, some, missing),
        *_of_labels(some),
        *_of_importance(some),
    ]


def _curves(section: Section, missing: list[str]) -> Picture:
    row = row_of("", {g.name: [run.curve for run in g.runs.values()] for g in section.groups})
    if SIMULATED_TIME not in row.panels:
        missing.append("No curve by simulated time: no run was on simulated devices.")
    caption = (
        f"{row.ylabel.capitalize()} by {', '.join(row.panels)}; bands from the lowest to the "
        "highest seed."
    )
    names = [group.name for group in section.groups]
    return Picture("curves", caption, figure_of([row], names, ""))


def _of_clients(section: Section, some: Sequence[Group], missing: list[str]) -> list[Picture]:
    """Return the figures with a panel, or a line, for each group, of what is known."""
    metric, title = section.metric, ""  # the headings above, and the captions, say it
    figures: dict[str, tuple[str, Frames, Callable[[Frames], Figure]]] = {
        "clients": (
            f"{metric.title.capitalize()} of each client by rank, the worst tenth marked.",
            {group.name: _scores_of(group, metric.name) for group in some},
            lambda frames: scores_by_rank(frames, metric, title),
        ),
        "ranks": (
            "Rank that clients of each budget trained by round: mean, and range of the clients.",
            {group.name: trained_ranks(group.first) for group in some},
            lambda frames: ranks_over_rounds(frames, title),
        ),
        "influence": (
            "Influence: share of each rank in the adapter's step beside that in the data, mean "
            "over the rounds; lines from the lowest round to the highest.",
            {group.name: group.first.influence for group in some},
            lambda frames: influence_by_rank(frames, title),
        ),
        "energy": (
            "Energy of the last global update by singular value: mean, and range of the layers.",
            {group.name: _energy_of(group, missing) for group in section.groups},
            lambda frames: energy_by_value(frames, title),
        ),
        "bytes": (
            f"Bytes of training by client, seed {some[0].first.seed}.",
            {group.name: group.first.clients for group in some},
            lambda frames: bytes_by_client(frames, title),
        ),
    }
    pictures = []
    for name, (caption, frames, draw) in figures.items():
        if known := {group: frame for group, frame in frames.items() if not frame.empty}:
            pictures.append(Picture(name, caption, draw(known)))
    return pictures


def _of_labels(some: Sequence[Group]) -> list[Picture]:
    return [
        Picture(
            _numbered("labels", number),
            f"Training rows by class and client, before training: {name}.",
            labels_by_client(labels, name),
        )
        for number, (name, labels) in enumerate(_distinct_labels(some).items())
    ]


def _of_importance(some: Sequence[Group]) -> list[Picture]:
    return [
        Picture(
            _numbered("importance", number),
            f"Importance of layers and components over rounds: {group.name}.",
            importance_over_rounds(group.first.importance, group.name),
        )
        for number, group in enumerate(some)
        if not group.first.importance.empty
    ]


def _numbered(name: str, number: int) -> str:
    return f"{name}-{number + 1}" if number else name


def trained_ranks(run: Run) -> pd.DataFrame:
    """Return the ranks that a run's clients trained, see `ranks_trained`; empty if not known."""
    modules = run.importance["module"].nunique()
    return ranks_trained(run.clients, modules) if modules else pd.DataFrame()


def _energy_of(group: Group, missing: list[str]) -> pd.DataFrame:
    try:
        return read_energy(group.first.folder)
    except UnreadableRunError as error:
        missing.append(f"No energy of {group.name}: {error}")
        return pd.DataFrame()


def _scores_of(group: Group, metric: str) -> pd.DataFrame:
    known = [
        run.scores.assign(seed=seed)
        for seed, run in group.runs.items()
        if not run.scores.empty and metric in run.scores
    ]
    return pd.concat(known) if known else pd.DataFrame()


def _distinct_labels(groups: Sequence[Group]) -> dict[str, pd.DataFrame]:
    """Return the classes of each group's first run, those alike once, by the groups' names."""
    distinct: list[tuple[list[str], pd.DataFrame]] = []
    for group in groups:
        labels = group.first.labels
        if labels.empty:
            continue
        same = next((names for names, frame in distinct if frame.equals(labels)), None)
        if same is None:
            distinct.append(([group.name], labels))
        else:
            same.append(group.name)
    if len(distinct) == 1:
        return {f"seed {groups[0].first.seed}": distinct[0][1]}
    return {", ".join(names): frame for names, frame in distinct}
