"""Instruction data: tables of prompts and answers, from the folders that they come in."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pandas as pd

from hafl_app.data.errors import DataError
from hafl_app.data.files import read_table
from hafl_app.data.tables import standardize
from hafl_app.data.template import columns_of, prompts

CLIENT: Final = "client"
TASK: Final = "task"
"""Columns that say whose a row is, for ``partition=natural``."""

_ONE_CLASS: Final = "all"
_CLIENT_FILE = re.compile(r"local_training_(\d+)\.json")


def with_pairs(
    table: pd.DataFrame, template: str | None, answer_column: str, label_column: str, origin: str
) -> pd.DataFrame:
    """Add the columns ``text`` (the prompt), ``answer`` and ``label``, and keep the others.

    Parameters
    ----------
    table
        One row per example.
    template
        See `hafl_app.data.template.render`.
    answer_column
        What is to be learned; neither null nor blank.
    label_column
        The row's category; empty for one category of all.
    origin
        File or folder, for messages.

    Raises
    ------
    DataError
        If there is no template, a column is missing, or an answer is null, blank or no text.
    """
    if not template:
        raise DataError(
            f"dataset.template must be given for {origin}, e.g. '{{instruction}}\\n\\n'"
        )
    columns_of(template)
    label = label_column or "label"
    rows = table if label_column else table.assign(label=_ONE_CLASS)
    answers = standardize(rows, answer_column, label, origin)
    made = prompts(table, template, origin)
    return answers.assign(answer=answers["text"]).assign(text=made)


def read_dolly(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read Dolly as FederatedScope splits it, with the column `CLIENT` from the files' names.

    Parameters
    ----------
    folder
        With ``local_training_0.json`` and so on, a file for each client, and ``global_test.json``.

    Raises
    ------
    DataError
        If there are no such files, or one cannot be read.
    """
    found = {int(m[1]): file for file in _files(folder) if (m := _CLIENT_FILE.fullmatch(file.name))}
    test = folder / "global_test.json"
    if not found or not test.is_file():
        raise DataError(
            f"dataset.path: expected local_training_0.json to ..._9.json and global_test.json in "
            f"{folder}"
        )
    parts = [read_table(file, ()).assign(**{CLIENT: number}) for number, file in found.items()]
    return pd.concat(parts, ignore_index=True), read_table(test, ())


def read_tasks(folder: Path) -> pd.DataFrame:
    """Read Natural Instructions: columns `TASK`, ``definition``, ``input`` and ``output``.

    Wang et al., "Super-NaturalInstructions", EMNLP 2022, arXiv:2204.07705.

    Parameters
    ----------
    folder
        With one JSON file a task, as in the original repository's ``tasks``. An instance counts
        with the first of its outputs.

    Raises
    ------
    DataError
        If there is no such file, or one is not of that form.
    """
    files = [file for file in _files(folder) if file.suffix == ".json"]
    rows = [row for file in files for row in _instances(file)]
    if not rows:
        raise DataError(f"dataset.path: no tasks of Natural Instructions (*.json) in {folder}")
    return pd.DataFrame(rows)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"dataset.path: expected a folder, got {folder}")
    return sorted(folder.iterdir())


def _instances(file: Path) -> Iterator[dict[str, Any]]:
    try:
        task = json.loads(file.read_text(encoding="utf-8"))
        definition = "\n".join(task["Definition"])
        for instance in task["Instances"]:
            yield {
                TASK: file.stem,
                "definition": definition,
                "input": instance["input"],
                "output": instance["output"][0],
            }
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"{file}: no task of Natural Instructions ({type(error).__name__})"
        ) from error
