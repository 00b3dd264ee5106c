"""Text classification sets from the Hugging Face hub."""

from typing import Any

import datasets
import pandas as pd

from hafl_app.data.errors import DataError
from hafl_app.data.tables import standardize


def read_hub(name: str, revision: str | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Load the training and test split of a hub set in the usual shape.

    The set has the columns ``text`` and ``label``; names of labels are those of a column
    ``label_text`` or of the label's ``ClassLabel``, else the labels themselves.

    Parameters
    ----------
    name
        Hub id such as ``mteb/banking77``.
    revision
        Branch, tag or commit; None for the newest.

    Returns
    -------
    tuple of DataFrame
        Train and test, with ``text`` and ``label`` (the name) as strings.

    Raises
    ------
    DataError
        If the hub cannot be reached or the set does not have this shape.
    """
    splits = _load(name, revision)
    missing = {"train", "test"} - set(splits)
    if missing:
        raise DataError(f"dataset.hub: {name!r} has no split {', '.join(sorted(missing))}")
    return _named(splits["train"], f"{name}, train"), _named(splits["test"], f"{name}, test")


def read_hub_table(name: str, revision: str | None) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Load the training split of a hub set, and its test split if there is one, as they are.

    Raises
    ------
    DataError
        If the hub cannot be reached, or the set has no training split.
    """
    splits = _load(name, revision)
    if "train" not in splits:
        raise DataError(
            f"dataset.hub: {name!r} has no split train, only {', '.join(map(str, splits))}; give "
            "one of its files as dataset.path"
        )
    test = splits["test"].to_pandas() if "test" in splits else None
    return splits["train"].to_pandas(), test


def _load(name: str, revision: str | None) -> Any:
    try:
        return datasets.load_dataset(name, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"dataset.hub: cannot load {name!r} from the hub ({reason}); without a network set "
            "dataset.path to a folder that holds the files"
        ) from error


def _named(split: Any, origin: str) -> pd.DataFrame:
    table = split.to_pandas()
    label = "label_text" if "label_text" in table.columns else "label"
    names = getattr(split.features.get(label), "names", None)
    if names is not None:
        table = table.assign(label=[names[index] for index in table[label]])
    return standardize(table, "text", label, origin, allow_blank=True)
