"""Prompts and their expected answers as text, for a model that writes."""

from typing import NamedTuple

from datasets import Dataset

from hafl_app.data.text import Prompt


class Pairs(NamedTuple):
    """Prompts with answers, in full length.

    Parameters
    ----------
    prompts, answers, categories
        One of each per row; a prompt is a text, or the messages of a conversation.
    """

    prompts: list[Prompt]
    answers: list[str]
    categories: list[str]


def pairs_of(rows: Dataset, label_names: tuple[str, ...]) -> Pairs:
    """Return the pairs of rows with the columns ``text``, ``answer`` and ``label``."""
    columns = rows.with_format(None)
    categories = [label_names[label] for label in columns["label"][:]]
    return Pairs(columns["text"][:], columns["answer"][:], categories)
