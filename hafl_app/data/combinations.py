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


def check_sharing(choices: DatasetSettings, kind: str) -> None:
    """Refuse to share out by class what has none.

    Raises
    ------
    DataError
        In one line.
    """
    if kind in BY_CLASS and choices.answer_column and not choices.label_column:
        raise DataError(
            f"partition.kind={kind} shares out by category, but dataset.label_column is empty; "
            "name a column of categories, or take partition=iid or natural"
        )


def _unread(setting: str, value: str, source: str) -> DataError:
    return DataError(
        f"{setting}={value!r}: dataset.source={source} reads no such file; expected null"
    )
