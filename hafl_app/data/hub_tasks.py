"""Natural Instructions from the Hugging Face hub, in the columns of the original files."""

from typing import Any, Final

import datasets
import pandas as pd

from hafl_app.data.errors import DataError, require_column
from hafl_app.data.instructions import TASK

_COLUMNS: Final = {
    "task_name": TASK,
    "definition": "definition",
    "inputs": "input",
    "targets": "output",
}
"""Columns of the hub's copies, such as ``Muennighoff/natural-instructions``, to a folder's."""


def read_hub_tasks(
    name: str, revision: str | None, most: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """Read the training split of a hub set: columns `TASK`, ``definition``, ``input``, ``output``.

    Its other splits hold other tasks, so none of them can be the test set of these.

    Parameters
    ----------
    name, revision
        Hub id, and branch, tag or commit; None for the newest.
    most
        Rows of a random subset, drawn before anything is read into memory: the whole set has
        millions. None for all.
    seed
        Of the subset.

    Raises
    ------
    DataError
        If the hub cannot be reached, or the set has no such split or columns.
    """
    try:
        rows: Any = datasets.load_dataset(name, revision=revision, split="train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"dataset.hub: cannot load {name!r} from the hub ({reason}); without a network set "
            "dataset.path to a folder of tasks"
        ) from error
    for column in _COLUMNS:
        require_column(rows.column_names, column, "dataset.hub", name)
    if most is not None and most < len(rows):
        rows = rows.shuffle(seed=seed).select(range(most))
    table: pd.DataFrame = rows.select_columns(list(_COLUMNS)).to_pandas()
    return table.rename(columns=_COLUMNS)
