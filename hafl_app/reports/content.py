"""Content of a report over runs: tables and figures, before they are written anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from hafl_app.reports.answer_tables import answer_tables
from hafl_app.reports.folders import find_runs
from hafl_app.reports.groups import Section, sections_of
from hafl_app.reports.pictures import Picture, pictures_of
from hafl_app.reports.records import UnreadableRunError
from hafl_app.reports.runs import Run, read_run
from hafl_app.reports.section_tables import (
    clients_table,
    differences_table,
    scores_table,
    settings_table,
    slices_tables,
)
from hafl_app.reports.tables import Table

_FINISHED: Final = "finished"


@dataclass(frozen=True)
class Chapter:
    """What a report says of one section's runs."""

    title: str
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    notes: Sequence[str]


@dataclass(frozen=True)
class Report:
    """Whole report.

    Parameters
    ----------
    folders
        As they were named.
    chapters
        One a section.
    left_out
        Line for every folder that does not count, with the reason.
    """

    folders: Sequence[str]
    chapters: Sequence[Chapter]
    left_out: Sequence[str]


def report_on(folders: Sequence[Path], baseline: str = "") -> Report:
    """Read all runs in and under these folders and put the report on them together.

    Parameters
    ----------
    baseline
        Group that the others are compared with; empty: see `sections_of`.

    Raises
    ------
    ValueError
        In one line, if a folder has no run, none finished, or no group has the baseline's name.
    """
    found, left_out = [], []
    for place in find_runs(folders):
        try:
            run = read_run(place.folder)
            _touch(run)
        except UnreadableRunError as error:
            left_out.append(str(error))
            continue
        if run.summary.get("status") != _FINISHED:
            left_out.append(f"{place.folder}: not finished, after {len(run.curve.test) - 1} rounds")
            continue
        found.append((place, run))
    if not found:
        more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
        raise UnreadableRunError(f"no finished run: {left_out[0]}{more}")
    sections = sections_of(found, baseline)
    chapters = [_chapter(section, number) for number, section in enumerate(sections, start=1)]
    return Report([str(folder) for folder in folders], chapters, left_out)


def _touch(run: Run) -> None:
    """Read what a report needs, so that a damaged file shows before anything is drawn."""
    frames = (run.rounds, run.clients, run.scores, run.importance, run.influence, run.labels)
    for frame in (*frames, run.answers):
        del frame


def _chapter(section: Section, number: int) -> Chapter:
    missing: list[str] = []
    tables = [
        *settings_table(section),
        scores_table(section),
        *differences_table(section),
        *slices_tables(section),
        *clients_table(section, missing),
        *answer_tables(section),
    ]
    pictures = [
        # Names of files: those of a later section begin with its number.
        replace(picture, name=f"{number}-{picture.name}") if number > 1 else picture
        for picture in pictures_of(section, missing)
    ]
    return Chapter(section.title, tables, pictures, [*section.notes, *missing])
