"""``answers.md``: what the global adapter answered to the same prompts, round after round."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from hafl_app.printable import markdown_text
from hafl_app.tracking.jsonl import replace_file

ANSWERS_FILE: Final = "answers.md"
_LONGEST: Final = 4000  # characters of a prompt or an answer
_INTRODUCTION: Final = (
    "The global adapter's answers to the same prompts after each round that was evaluated: its "
    "most probable tokens, up to a limit. Round 0 is the base model alone."
)


class AnswersPage:
    """The page in a run's folder, written anew after each round.

    Parameters
    ----------
    folder
        Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ANSWERS_FILE
        self._records: list[Mapping[str, Any]] = []

    def start(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Begin with the records of the rounds that are kept; without any an old page goes."""
        self._records = list(records)
        if not self._records:
            self._path.unlink(missing_ok=True)

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a round's answers, see `hafl_app.tracking.details.answers_record`.

        Raises
        ------
        OSError
            If the disk does not take the page.
        """
        self._records.append(record)
        replace_file(self._path, page(self._records))

    def facts(self) -> dict[str, int]:
        """Return how many prompts were answered last, for the summary; empty for none."""
        return {"prompts": len(self._records[-1]["answers"])} if self._records else {}


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the page: a section for each prompt, with a line for each round."""
    asked: dict[str, list[str]] = {}
    for record in records:
        for one in record["answers"]:
            lines = asked.setdefault(one["prompt"], _head(one))
            lines.append(f"- **round {record['server_round']}**: {_shown(one['answer'])}")
    sections = [
        "\n".join([f"## Prompt {number}", "", *lines])
        for number, lines in enumerate(asked.values(), start=1)
    ]
    return "\n\n".join(["# Answers", _INTRODUCTION, *sections]) + "\n"


def _head(one: Mapping[str, Any]) -> list[str]:
    lines = [f"> {_shown(one['prompt'])}", ""]
    if one["category"]:
        lines += [f"Category: {_shown(one['category'])}", ""]
    if one["expected"]:
        lines += [f"Expected: {_shown(one['expected'])}", ""]
    return lines


def _shown(text: str) -> str:
    return markdown_text(text, _LONGEST) or "*(nothing)*"
