"""Find the training file and the test file of a folder."""

import re
from pathlib import Path

from hafl_app.data.decoding import FORMATS, format_of
from hafl_app.data.errors import DataError, nearest

_MOST_NAMED = 5  # files in a message


def resolve(path: str, setting: str) -> Path:
    """Find the file or folder that a setting names.

    Raises
    ------
    DataError
        If it does not exist.
    """
    found = Path(path).expanduser().absolute()
    if not found.exists():
        siblings = [p.name for p in found.parent.iterdir()] if found.parent.is_dir() else []
        raise DataError(
            f"{setting}: no file or folder {str(found)!r}{nearest(found.name, siblings)}"
        )
    return found


def _none_found(folder: Path, split: str) -> DataError:
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    seen = ", ".join(names[:_MOST_NAMED]) + more if names else "nothing"
    return DataError(
        f"dataset.path: no {split} file in {folder}, which holds {seen}; expected a name with "
        f"the word {split!r} that ends in {', '.join(FORMATS)}, packed (.gz, .bz2, .xz) or not"
    )


def find_split(folder: Path, split: str) -> Path | None:
    """Find the one table of a folder whose name carries the word ``split``.

    ``train.csv`` goes before names such as ``news_train_v2.jsonl.gz``.

    Returns
    -------
    Path | None
        The file, or None if there is none.

    Raises
    ------
    DataError
        If several files could be meant.
    """
    tables = [p for p in sorted(folder.iterdir()) if p.is_file() and format_of(p) in FORMATS]
    exact = [p for p in tables if p.name.partition(".")[0] == split]
    word = re.compile(rf"(^|[^a-z]){split}([^a-z]|$)")
    found = exact or [p for p in tables if word.search(p.name)]
    if len(found) > 1:
        raise DataError(
            f"{folder} holds several {split} files ({', '.join(p.name for p in found)}): "
            "give dataset.path and dataset.test_path as files"
        )
    return found[0] if found else None


def train_file(folder: Path) -> Path:
    """Find the training data of a folder.

    Raises
    ------
    DataError
        If there is no such file, or several.
    """
    found = find_split(folder, "train")
    if found is None:
        raise _none_found(folder, "train")
    return found


def both_files(folder: Path) -> tuple[Path, Path]:
    """Find the training and the test data of a folder.

    Raises
    ------
    DataError
        If it is no folder, or either file is missing or not clear.
    """
    if not folder.is_dir():
        raise DataError(f"dataset.path: expected a folder with train and test files, got {folder}")
    test = find_split(folder, "test")
    if test is None:
        raise _none_found(folder, "test")
    return train_file(folder), test
