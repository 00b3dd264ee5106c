"""Instruction data: tables of prompts and answers, from the folders that they come in."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd

from hafl_app.data.conversations import ONE_CLASS
from hafl_app.data.decoding import read_text
from hafl_app.data.errors import DataError
from hafl_app.data.files import read_table
from hafl_app.data.json_rows import parse
from hafl_app.data.tables import shuffled, standardize
from hafl_app.data.template import prompts, refuse_answer_in

CLIENT: Final = "client"
TASK: Final = "task"
"""Columns that say whose a row is, for ``partition=natural``."""

_ITS_COLUMN: Final = " category"  # a name that no column of a file has
_MOST_NAMED = 5
_CLIENT_FILE = re.compile(r"local_training_(\d+)\.json")


def with_pairs(
    table: pd.DataFrame,
    template: str | None,
    answer_column: str,
    label_column: str,
    origin: str,
    listed: Collection[str] = (),
) -> pd.DataFrame:
    """Add the columns ``text`` (the prompt), ``answer`` and ``label``, and keep the others.

    Parameters
    ----------
    table
        One row per example.
    template
        See `hafl_app.data.template.render`.
    answer_column
        Answer to be learned; neither null nor blank.
    label_column
        The row's category; empty for one category of all.
    origin
        File or folder, for messages.
    listed
        Names of categories that may differ as little as they like.

    Raises
    ------
    DataError
        If there is no template, it names the answer, a column is missing, or an answer is null,
        blank or no text.
    """
    if not template:
        raise DataError(
            f"dataset.template must be given for {origin}, e.g. '{{instruction}}\\n\\n'"
        )
    refuse_answer_in(template, answer_column)
    rows = table if label_column else table.assign(**{_ITS_COLUMN: ONE_CLASS})
    answers = standardize(rows, answer_column, label_column or _ITS_COLUMN, origin, listed=listed)
    made = prompts(table, template, origin)
    whole = answers.assign(answer=answers["text"]).assign(text=made)
    return whole.drop(columns=_ITS_COLUMN, errors="ignore")


def read_dolly(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read Dolly as FederatedScope splits it, with the column `CLIENT` from the files' names.

    Parameters
    ----------
    folder
        With ``local_training_0.json`` and so on, a file for each client, and ``global_test.json``.

    Raises
    ------
    DataError
        If there are no such files, a number below the greatest is missing or occurs twice, or a
        file cannot be read.
    """
    matches = [m for file in _files(folder) if (m := _CLIENT_FILE.fullmatch(file.name))]
    found = {int(m[1]): folder / m[0] for m in matches}
    test = folder / "global_test.json"
    if not found or not test.is_file():
        raise DataError(
            f"dataset.path: expected local_training_0.json to ..._9.json and global_test.json in "
            f"{folder}"
        )
    if len(found) < len(matches):
        raise DataError(f"dataset.path: a client's number occurs twice in {folder}, as 1 and 01")
    missing = [n for n in range(min(max(found) + 1, len(found) + _MOST_NAMED)) if n not in found]
    if missing:
        names = ", ".join(f"local_training_{n}.json" for n in missing[:_MOST_NAMED])
        more = "" if len(missing) <= _MOST_NAMED else " and more"
        raise DataError(
            f"dataset.path: {names}{more} missing in {folder}, which has client {max(found)}"
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


def share_of_tasks(tasks: pd.DataFrame, fraction: float, seed: Sequence[int]) -> pd.DataFrame:
    """Return a random share of each task's rows, in the order of the table.

    Parameters
    ----------
    tasks
        With a column `TASK`.
    fraction
        Above 0 and at most 1. Rounded to whole rows; no task loses all of its rows.
    seed
        Of the draw. The share of a smaller fraction is part of that of a larger one.
    """
    if fraction == 1:
        return tasks
    drawn = shuffled(tasks, None, seed).groupby(TASK, sort=False)
    sizes = drawn[TASK].transform("size")
    kept = drawn.cumcount() < (sizes * fraction).round().clip(lower=1)
    return tasks[kept.reindex(tasks.index)]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"dataset.path: expected a folder, got {folder}")
    return sorted(folder.iterdir())


def _instances(file: Path) -> list[dict[str, Any]]:
    try:
        task = parse(read_text(file), str(file))
        definition = "\n".join(_listed(task["Definition"]))
        instances = [
            {
                TASK: file.stem,
                "definition": definition,
                "input": _is_text(instance["input"]),
                "output": _is_text(_listed(instance["output"])[0]),
            }
            for instance in task["Instances"]
        ]
    except DataError:
        raise
    except (OSError, LookupError, TypeError) as error:
        raise DataError(
            f"{file}: no task of Natural Instructions ({type(error).__name__})"
        ) from error
    if not instances:
        # Else a task, and with partition=natural a client, would be missing.
        raise DataError(f"{file}: a task without instances")
    return instances


def _listed(value: Any) -> list[Any]:
    """Return a list, or a text that stands for a list of itself; its letters are no list."""
    if isinstance(value, list):
        return value
    return [_is_text(value)]


def _is_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
