"""Text by source: labeled, or prompts with answers; public sets, own files, or generated."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import datasets
import numpy as np
import pandas as pd

from hafl_app.data.combinations import ON_DEVICE, check_choices
from hafl_app.data.conversations import conversations_of, strings_of
from hafl_app.data.errors import DataError, nearest
from hafl_app.data.files import read_names, read_table
from hafl_app.data.folders import both_files, find_split, resolve, train_file
from hafl_app.data.hub import read_hub, read_hub_table
from hafl_app.data.hub_tasks import read_hub_tasks
from hafl_app.data.instructions import read_dolly, read_tasks, share_of_tasks, with_pairs
from hafl_app.data.label_rules import class_fault, normal_name, sorted_label_names
from hafl_app.data.labels import label_fault
from hafl_app.data.settings import DatasetSettings
from hafl_app.data.splits import split_off
from hafl_app.data.tables import (
    NOTES,
    index_labels,
    shuffled,
    standardize,
    to_dataset,
)
from hafl_app.fields import choices_of

__all__ = ["DataError", "LabeledText", "load_text"]

TEST_FRACTION: Final = 0.1
"""Share of a local training file that becomes the test set where none is given."""

IMAGE_TEST_FRACTION: Final = 0.2
"""Share of a set of training images that becomes the test set where none is given."""


@dataclass(frozen=True)
class LabeledText:
    """A data set of labeled texts, of prompts with answers, or of labeled images.

    Parameters
    ----------
    train, test
        Columns ``text`` (string) and ``label`` (int, an index into ``label_names``), beside
        the others of the file; with answers, ``text`` is the prompt, of conversations a list of
        messages, and ``answer`` a string. In place of ``text`` images have ``pixels``, nested lists
        (channels, height, width).
    label_names
        Name of each class, or of each category of prompts.
    num_read
        Rows of the training and of the test data before ``max_examples`` and
        ``max_test_examples``.
    notes
        Changes of the files' labels, in words.
    """

    train: datasets.Dataset
    test: datasets.Dataset
    label_names: tuple[str, ...]
    num_read: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()


class _Tables(NamedTuple):
    """Tables whose label is still a name; names None means: those of the training data."""

    train: pd.DataFrame
    test: pd.DataFrame
    label_names: tuple[str, ...] | None


def load_text(source: DatasetSettings) -> LabeledText:
    """Load a data set, in a random order that follows from ``data_seed``.

    Raises
    ------
    DataError
        If the source is unknown or its settings do not go together, a file or column is missing, a
        file cannot be read, a text or label is null, the labels are no classes or only one, or a
        test label does not occur in the training data.
    """
    if source.source == ON_DEVICE:
        raise DataError(
            "dataset=on_device: the data stay on the nodes, each names its file with data-path in "
            "its --node-config; simulated nodes have none"
        )
    if source.source not in _READERS:
        known = ", ".join(choices_of(DatasetSettings, "source"))
        raise DataError(
            f"dataset.source: {source.source!r} is none of {known}"
            f"{nearest(source.source, _READERS)}"
        )
    check_choices(source)
    train, test, names = _READERS[source.source](source)
    if source.has_answers and "answer" not in train:
        raise DataError(
            f"dataset.answer_column={source.answer_column}: {source.source!r} has no answers"
        )
    notes = tuple(dict.fromkeys((*train.attrs.get(NOTES, ()), *test.attrs.get(NOTES, ()))))
    names = _class_names(train, source, names)
    train, test = index_labels(train, names, "train"), index_labels(test, names, "test")
    num_read = (len(train), len(test))
    train = shuffled(train, source.max_examples, (source.data_seed, 0))
    if not source.has_answers and train["label"].nunique() < 2:
        raise DataError(
            f"dataset.label_column: all {len(train)} training rows are of one class; expected at "
            "least 2 classes"
        )
    test = shuffled(test, source.max_test_examples, (source.data_seed, 1))
    return LabeledText(to_dataset(train, "train"), to_dataset(test, "test"), names, num_read, notes)


def _class_names(
    train: pd.DataFrame, source: DatasetSettings, listed: tuple[str, ...] | None
) -> tuple[str, ...]:
    """Return the classes that the settings or a file list, else those of the training data."""
    names = tuple(source.label_names or listed or sorted_label_names(train["label"]))
    fault = label_fault([normal_name(name) for name in names])
    if not (fault or source.has_answers or source.label_names):
        fault = class_fault(train["label"])
    if fault:
        where = "label_names" if source.label_names else "label_column"
        raise DataError(f"dataset.{where}: {fault}")
    return names


def _read_banking77(source: DatasetSettings) -> _Tables:
    if not source.path:
        return _from_hub(source)
    folder = resolve(source.path, "dataset.path")
    train, test = (_read_file(file, source) for file in both_files(folder))
    # Sorted, so that a class has the number that it has in the hub's copy.
    return _Tables(train, test, tuple(sorted(read_names(folder / "categories.json"))) or None)


def _read_newsgroups(source: DatasetSettings) -> _Tables:
    if not source.path:
        return _from_hub(source)
    folder = resolve(source.path, "dataset.path")
    names = read_names(folder / "labels.json")
    train, test = (_read_posts(file, names) for file in both_files(folder))
    return _Tables(train, test, names or None)


def _read_posts(file: Path, names: tuple[str, ...]) -> pd.DataFrame:
    """Read posts; the model reads the subject and, on the next line, the body."""
    table = read_table(file, ())
    subject, body = (
        standardize(table, column, "label", str(file), allow_blank=True)
        for column in ("subject", "text")
    )
    by_number = {str(number): name for number, name in enumerate(names)}
    return body.assign(
        text=subject["text"] + "\n" + body["text"],
        label=[by_number.get(label, label) for label in body["label"]],
    )


def _read_local(source: DatasetSettings) -> _Tables:
    if source.has_conversations and source.hub and not source.path:
        train, test = read_hub_table(source.hub, source.revision)
        made = _with_pairs(train, source, source.hub)
        if test is None:
            return _split_test_off(made, source.data_seed)
        return _Tables(made, _with_pairs(test, source, source.hub), None)
    if not source.path:
        hub = " (or dataset.hub)" if source.has_conversations else ""
        raise DataError(f"dataset.path: the source 'local' needs a file or folder{hub}, got none")
    path = resolve(source.path, "dataset.path")
    test_file = resolve(source.test_path, "dataset.test_path") if source.test_path else None
    if path.is_dir():
        test_file = test_file or find_split(path, "test")
    train = _read_file(train_file(path) if path.is_dir() else path, source)
    if test_file is None:
        return _split_test_off(train, source.data_seed)
    return _Tables(train, _read_file(test_file, source), None)


def _read_gsm8k(source: DatasetSettings) -> _Tables:
    train, test = (
        _with_pairs(read_table(file, ()), source, str(file)) for file in both_files(_folder(source))
    )
    return _Tables(train, test, None)


def _read_dolly(source: DatasetSettings) -> _Tables:
    folder = _folder(source)
    train, test = (_with_pairs(table, source, str(folder)) for table in read_dolly(folder))
    return _Tables(train, test, None)


def _read_natural_instructions(source: DatasetSettings) -> _Tables:
    if not source.path and source.hub:
        most = source.max_examples
        # So many that as many are left for training of each task's share, without the test set.
        share = (1 - TEST_FRACTION) * source.task_fraction
        drawn = None if most is None else math.ceil(most / share)
        tasks = read_hub_tasks(source.hub, source.revision, drawn, source.data_seed)
        origin = source.hub
    else:
        tasks, origin = read_tasks(_folder(source)), str(source.path)
    tasks = share_of_tasks(tasks, source.task_fraction, (source.data_seed, 2))
    return _split_test_off(_with_pairs(tasks, source, origin), source.data_seed)


def _folder(source: DatasetSettings) -> Path:
    if not source.path:
        raise DataError(f"dataset.path: the source {source.source!r} needs a folder, got none")
    return resolve(source.path, "dataset.path")


def _with_pairs(table: pd.DataFrame, source: DatasetSettings, origin: str) -> pd.DataFrame:
    if source.has_conversations:
        return conversations_of(table, source, origin)
    if not source.answer_column:
        raise DataError(f"dataset.answer_column must be given for {origin}")
    listed = source.label_names or ()
    return with_pairs(
        table, source.template, source.answer_column, source.label_column, origin, listed
    )


def _read_file(file: Path, source: DatasetSettings) -> pd.DataFrame:
    if source.has_answers:
        return _with_pairs(
            read_table(file, strings_of(source), source.label_column), source, str(file)
        )
    columns = (source.text_column, source.label_column)
    table = read_table(file, columns, source.label_column)
    return standardize(table, *columns, str(file), listed=source.label_names or ())


def _split_test_off(table: pd.DataFrame, seed: int, fraction: float = TEST_FRACTION) -> _Tables:
    if len(table) < 2:
        raise DataError("dataset.test_path: no test set can be split off a single row; give one")
    rows = np.arange(len(table))
    kept, test = split_off(rows, fraction, seed, table["label"].to_numpy())
    return _Tables(table.iloc[kept], table.iloc[test], sorted_label_names(table["label"]))


def _read_synthetic(source: DatasetSettings) -> _Tables:
    # Here, because its word tables are loaded only if they are used.
    from hafl_app.data.synthetic import generate  # noqa: PLC0415

    train_texts, train_labels, test_texts, test_labels, names = generate(
        source.num_train, source.num_test, source.data_seed
    )
    train, test = (
        pd.DataFrame({"text": texts, "label": [names[label] for label in labels]})
        for texts, labels in ((train_texts, train_labels), (test_texts, test_labels))
    )
    return _Tables(train, test, names)


def _read_digits(source: DatasetSettings) -> _Tables:
    # Here, because the import takes its time and concerns few.
    from hafl_app.data.digits import read_digits  # noqa: PLC0415

    return _split_test_off(read_digits(), source.data_seed, IMAGE_TEST_FRACTION)


def _from_hub(source: DatasetSettings) -> _Tables:
    if not source.hub:
        raise DataError(f"dataset.path: {source.source!r} needs a folder (or dataset.hub)")
    train, test = read_hub(source.hub, source.revision)
    return _Tables(train, test, None)


_READERS: Final[dict[str, Callable[[DatasetSettings], _Tables]]] = {
    "banking77": _read_banking77,
    "newsgroups": _read_newsgroups,
    "dolly": _read_dolly,
    "gsm8k": _read_gsm8k,
    "natural_instructions": _read_natural_instructions,
    "local": _read_local,
    "synthetic": _read_synthetic,
    "digits": _read_digits,
}
