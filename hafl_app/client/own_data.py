"""A node's own data file, named in its ``--node-config``."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hafl_app.config.schema import Settings
from hafl_app.data.own_file import OwnFile, OwnText
from hafl_app.data.shares import Share
from hafl_app.run import build
from hafl_app.run.tokenization import tokenizing
from hafl_app.training.settings import BaseSpec

DATA_PATH, TEXT_COLUMN, LABEL_COLUMN = "data-path", "text-column", "label-column"


@dataclass(frozen=True)
class _ReadOptions:
    """Options that decide a node's rows and tokens beside its file."""

    holdout_fraction: float
    seed: int
    spec: BaseSpec
    max_length: int


def own_file(settings: Settings, node_config: Mapping[str, Any]) -> OwnFile | None:
    """Return the file that a node's operator named, or None if the node has none.

    Parameters
    ----------
    node_config
        ``data-path``, and where they differ from the run's ``text-column`` and ``label-column``.
        It comes from the operator, so it needs no permission.
    """
    path, dataset = node_config.get(DATA_PATH), settings.dataset
    if not path:
        return None
    return OwnFile(
        str(path),
        str(node_config.get(TEXT_COLUMN, dataset.text_column)),
        str(node_config.get(LABEL_COLUMN, dataset.label_column)),
        dataset.max_examples,
        dataset.data_seed,
    )


def own_share(settings: Settings, file: OwnFile, label_names: Sequence[str] | None) -> Share:
    """Return a node's own data under the run's classes, or under its own if there are none yet.

    Raises
    ------
    hafl_app.data.errors.UnfitDataError
        If a column is missing, or a label is not among the run's.
    hafl_app.data.errors.DataError
        If the file cannot be read.
    """
    dataset = settings.dataset
    options = _ReadOptions(
        dataset.holdout_fraction, settings.seed, build.base_spec(settings), dataset.max_length
    )
    return _own_text(file, file.version(), options).share(label_names)


@functools.lru_cache(maxsize=8)
def _own_text(file: OwnFile, version: tuple[int, int], options: _ReadOptions) -> OwnText:
    del version  # part of the key: a process that lives on must see that the file was replaced
    return OwnText(
        file,
        holdout_fraction=options.holdout_fraction,
        seed=options.seed,
        **tokenizing(options.spec, options.max_length),
    )
