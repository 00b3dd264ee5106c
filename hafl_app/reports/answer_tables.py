"""Tables of what language models write: by category, on clients, and to the watched prompts."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from hafl_app.metrics import EXACT_MATCH, ROUGE_L
from hafl_app.printable import printable
from hafl_app.reports.groups import Group, Section
from hafl_app.reports.statistics import Spread
from hafl_app.reports.tables import Table, score

_LONGEST: Final = 200  # characters of a prompt or an answer
_MOST_CATEGORIES: Final = 30


def answer_tables(section: Section) -> list[Table]:
    """Return those tables for which the runs have anything."""
    return [*_categories(section), *_answers_of_clients(section), *_watched(section)]


def _categories(section: Section) -> Iterator[Table]:
    metric, rows = section.metric, []
    for group in section.groups:
        found = [_part(run.summary, "categories") for run in group.runs.values()]
        names = list(dict.fromkeys(name for its in found for name in its))
        for name in names[:_MOST_CATEGORIES]:
            its = [one[name] for one in found if isinstance(one.get(name), Mapping)]
            values = tuple(_number(one.get(metric.name)) for one in its)
            count = f"{_number(its[0].get('num_examples')):.0f}" if its else "0"
            rows.append([group.name, name, count, str(len(its)), score(Spread(values), metric)])
    if rows:
        note = "Test scores of the last round by category; mean ± standard deviation over n seeds."
        columns = ("runs", "category", "rows", "n", metric.title)
        yield Table(f"Test {metric.title} by category", columns, rows, note)


def _answers_of_clients(section: Section) -> Iterator[Table]:
    rows = []
    for group in section.groups:
        for who in ("seen", "unseen"):
            parts = (_part(run.summary, "client_generation") for run in group.runs.values())
            found = [part[who] for part in parts if isinstance(part.get(who), Mapping)]
            if found:
                rows.append([group.name, who, str(len(found)), *_generation_cells(found)])
    if rows:
        titles = [
            f"{m.title}{end}" for m in (ROUGE_L, EXACT_MATCH) for end in ("", ", worst tenth")
        ]
        note = (
            "Answers that clients wrote on prompts that they hold out, each with its own slice, "
            "after the last round; in percent, mean ± standard deviation over n seeds."
        )
        yield Table("Answers of clients", ("runs", "clients", "n", *titles), rows, note)


def _generation_cells(found: list[Mapping[str, Any]]) -> Iterator[str]:
    for metric in (ROUGE_L, EXACT_MATCH):
        worst = (_part(one, "worst_tenth").get(metric.name) for one in found)
        for values in ((one.get(metric.name) for one in found), worst):
            yield score(Spread(tuple(map(_number, values))), metric)


def _watched(section: Section) -> Iterator[Table]:
    """Yield the answers before and after training; those before once where they are the same."""
    rows: dict[tuple[str, str, str, str], None] = {}
    for group in section.groups:
        for prompt, who, when, answer in _first_and_last(group):
            key = (prompt, "all" if when == "0" else who, when, answer)
            rows.setdefault(key)
    if rows:
        ordered = sorted(
            rows, key=lambda row: list(dict.fromkeys(r[0] for r in rows)).index(row[0])
        )
        note = (
            "What the global adapter answers, of each group's first seed; round 0 is the base "
            "model alone. All rounds are in the runs' answers.md."
        )
        yield Table("Answers", ("prompt", "runs", "round", "answer"), ordered, note)


def _first_and_last(group: Group) -> Iterator[tuple[str, str, str, str]]:
    answers = group.first.answers
    if answers.empty:
        return
    for _, its in answers.groupby("prompt", sort=False):
        for row in (its.iloc[0], its.iloc[-1]):
            shown = (printable(row[name], _LONGEST) for name in ("prompt", "answer"))
            prompt, answer = shown
            yield prompt, group.name, str(row["server_round"]), answer


def _part(summary: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a part of a summary that a file may lack, or have as anything."""
    found = summary.get(name)
    return found if isinstance(found, Mapping) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
