"""Runs that differ in nothing but their seed, gathered; and the settings that others differ in."""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from hafl_app.data.errors import nearest
from hafl_app.metrics import Metric
from hafl_app.reports.folders import Place
from hafl_app.reports.runs import Run, method_of, value_text
from hafl_app.reports.tables import NONE

METHOD: Final = "strategy"
"""The method among the settings that differ."""
_NO_DIFFERENCE = ("seed", "output_dir", "resume", "name", "tags", "strategy._target_")
_OTHERS: Final = "outside of a comparison"
_MOST_IN_A_NAME = 3  # settings that differ

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """Runs of one set of settings on several seeds.

    Parameters
    ----------
    name
        Short, and its own within the section.
    runs
        By seed.
    """

    name: str
    runs: Mapping[int, Run]

    @property
    def first(self) -> Run:
        """The run of the lowest seed, which stands for all where a figure shows one."""
        return self.runs[min(self.runs)]

    @property
    def finals(self) -> dict[int, float]:
        """Test score in the last round by seed, where it is known."""
        last = {seed: run.curve.test[-1] for seed, run in sorted(self.runs.items())}
        return {seed: score for seed, score in last.items() if math.isfinite(score)}


@dataclass(frozen=True)
class Section:
    """Groups that can be compared: one metric, in one cell of a comparison if it has any.

    Parameters
    ----------
    title
        Empty where there is nothing to tell apart.
    metric
        Of all runs.
    groups
        In the order in which they were found.
    baseline
        Name of the group that the others are compared with.
    notes
        What a reader must know of the choice of runs.
    """

    title: str
    metric: Metric
    groups: Sequence[Group]
    baseline: str
    notes: Sequence[str] = field(default=())

    @property
    def runs(self) -> list[Run]:
        """All runs."""
        return [run for group in self.groups for run in group.runs.values()]


def sections_of(found: Sequence[tuple[Place, Run]], baseline: str = "") -> list[Section]:
    """Sort runs into sections and groups.

    Parameters
    ----------
    baseline
        Name of a group; empty: that of the comparison, else the first group.

    Raises
    ------
    ValueError
        If no section has a group of that name.
    """
    parts: dict[tuple[Path | None, str, Metric], list[tuple[Place, Run]]] = {}
    for place, run in found:
        parts.setdefault((place.comparison, place.cell, run.curve.metric), []).append((place, run))
    several = {
        "comparison": len({folder for folder, _, _ in parts}) > 1,
        "metric": len({metric for _, _, metric in parts}) > 1,
    }
    sections = []
    for (folder, cell, metric), members in parts.items():
        words = [
            folder.name if folder and several["comparison"] else "",
            cell,
            metric.title if several["metric"] else "",
        ]
        title = ", ".join(filter(None, words)) or (_OTHERS if len(parts) > 1 else "")
        sections.append(_section(title, metric, members, baseline))
    names = [group.name for section in sections for group in section.groups]
    if baseline and baseline not in names:
        there_are = ", ".join(dict.fromkeys(names))
        raise ValueError(f"--baseline {baseline}: there are {there_are}{nearest(baseline, names)}")
    return sections


def differing(settings: Sequence[Settings]) -> list[str]:
    """Return the names of the settings in which runs differ, the method first.

    A setting of a method counts if runs of the same method differ in it. Seed and folder never
    count, nor where a run was tracked.
    """
    names = dict.fromkeys(name for one in settings for name in one)
    methods = {method_of(one) for one in settings}
    found = [METHOD] if len(methods) > 1 else []
    for name in names:
        if name in _NO_DIFFERENCE or name.startswith("tracking."):
            continue
        if name.startswith("strategy."):
            of_methods = [[one for one in settings if method_of(one) == m] for m in methods]
        else:
            of_methods = [list(settings)]
        if any(len({_value(one, name) for one in some}) > 1 for some in of_methods):
            found.append(name)
    return found


def setting_text(settings: Settings, name: str) -> str:
    """Return the value of a setting, or the method's name, as a table shows it."""
    if name == METHOD:
        return method_of(settings)
    return value_text(settings.get(name, NONE))


def _section(
    title: str, metric: Metric, members: Sequence[tuple[Place, Run]], wanted: str
) -> Section:
    names = differing([run.settings for _, run in members])
    gathered: dict[Hashable, dict[int, Run]] = {}
    labels: dict[Hashable, str] = {}
    notes = []
    for place, run in members:
        key = (place.method, tuple(_value(run.settings, name) for name in [METHOD, *names]))
        labels[key] = place.method or _name(run.settings, names)
        its = gathered.setdefault(key, {})
        if run.seed in its:
            notes.append(f"{labels[key]}: two runs with seed {run.seed}; {run.folder} counts")
        its[run.seed] = run
    unique = _unique(list(labels.values()))
    groups = [Group(name, runs) for name, runs in zip(unique, gathered.values(), strict=True)]
    own = next((place.baseline for place, _ in members if place.baseline), "")
    choices = [name for name in (wanted, own) if name in unique]
    return Section(title, metric, groups, (choices or unique)[0], notes)


def _name(settings: Settings, names: Sequence[str]) -> str:
    """Return a name for a group: its method, and the first settings that differ."""
    words = [
        f"{name.rpartition('.')[2]}={setting_text(settings, name)}"
        for name in names
        if name != METHOD
    ]
    method = [method_of(settings) or "run"] if METHOD in names or not words else []
    return ", ".join([*method, *words[:_MOST_IN_A_NAME]])


def _unique(names: Sequence[str]) -> list[str]:
    """Return the names, with a number behind each that occurs more than once."""
    total, seen = Counter(names), Counter[str]()
    result = []
    for name in names:
        seen[name] += 1
        result.append(f"{name} ({seen[name]})" if total[name] > 1 else name)
    return result


def _value(settings: Settings, name: str) -> Hashable:
    value = method_of(settings) if name == METHOD else settings.get(name)
    return value if isinstance(value, Hashable) else str(value)
