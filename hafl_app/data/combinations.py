"""Settings of the data that cannot go together, refused before any file is read."""

from typing import Final

from hafl_app.data.errors import DataError
from hafl_app.data.settings import DatasetSettings
from hafl_app.data.template import refuse_answer_in

IMAGES: Final = frozenset({"digits"})
"""Sources of images instead of text."""

ON_DEVICE: Final = "on_device"
"""The source whose data stay on the nodes."""

BY_CLASS: Final = frozenset({"dirichlet", "pathological"})
"""Kinds of partition that share out each class by itself."""

_MADE: Final = frozenset({"synthetic", "digits"})
"""Sources without a file."""

_TALKING: Final = frozenset({"local", "on_device", "dolly", "gsm8k", "natural_instructions"})
"""Sources that may have conversations."""

_READ_TEST_PATH: Final = frozenset({"local", "on_device"})


def check_choices(choices: DatasetSettings) -> None:
    """Refuse settings that would be ignored, or give the answer away.

    Raises
    ------
    DataError
        In one line.
    """
    source = choices.source
    if choices.path and source in _MADE:
        raise _unread("dataset.path", choices.path, source)
    if choices.test_path and source not in _READ_TEST_PATH:
        raise _unread("dataset.test_path", choices.test_path, source)
    if choices.has_conversations:
        _check_conversations(choices)
        return
    if choices.system_prompt:
        raise DataError(
            "dataset.system_prompt: prompts of dataset.format=columns have no system message; "
            "write it into dataset.template, or take dataset.format=chat"
        )
    if choices.answer_column:
        if choices.template:
            refuse_answer_in(choices.template, choices.answer_column)
        if choices.label_column == choices.answer_column:
            raise DataError(
                f"dataset.label_column={choices.label_column} is the answer column; expected a "
                "column of categories, or '' for none"
            )
        return
    if choices.template:
        raise DataError(
            "dataset.template makes prompts, but there is no dataset.answer_column to learn"
        )
    if not choices.label_column and source not in _MADE:
        raise DataError("dataset.label_column is empty; expected the column of the classes")
    if choices.text_column == choices.label_column:
        raise DataError(
            f"dataset.text_column and dataset.label_column are both {choices.text_column!r}"
        )


def _check_conversations(choices: DatasetSettings) -> None:
    asked = f"dataset.format={choices.format}"
    if choices.source not in _TALKING:
        raise DataError(
            f"{asked}: dataset.source={choices.source} has no conversations; expected columns, or "
            f"one of {', '.join(sorted(_TALKING))}"
        )
    named = {"template": choices.template, "answer_column": choices.answer_column}
    given = [f"dataset.{name}" for name, value in named.items() if value]
    if given and choices.source == ON_DEVICE:
        raise DataError(f"{given[0]}: a run names no column of a node's file; expected null")
    if given and choices.format != "chat":
        raise DataError(
            f"{asked} reads columns of its own; expected {' and '.join(f'{g}=null' for g in given)}"
            ", or dataset.format=chat, whose user's message is made by the template"
        )
    if len(given) == 1:
        raise DataError(f"{asked}: {given[0]} needs the other of template and answer_column")
    if choices.template and choices.answer_column:
        refuse_answer_in(choices.template, choices.answer_column)


def check_sharing(choices: DatasetSettings, kind: str) -> None:
    """Refuse to share out by class what has none.

    Raises
    ------
    DataError
        In one line.
    """
    if kind in BY_CLASS and choices.has_answers and not choices.label_column:
        raise DataError(
            f"partition.kind={kind} shares out by category, but dataset.label_column is empty; "
            "name a column of categories, or take partition=iid or natural"
        )


def _unread(setting: str, value: str, source: str) -> DataError:
    return DataError(
        f"{setting}={value!r}: dataset.source={source} reads no such file; expected null"
    )
