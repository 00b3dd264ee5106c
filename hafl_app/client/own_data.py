"""A node's own data file, named in its ``--node-config``."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hafl_app.client.node_config import whole_number
from hafl_app.client.permissions import NotAllowedError
from hafl_app.config.schema import Settings
from hafl_app.data.combinations import ON_DEVICE
from hafl_app.data.labels import LONGEST_LABEL, MOST_LABELS
from hafl_app.data.own_file import OwnFile, OwnText
from hafl_app.data.shares import Share
from hafl_app.run import build
from hafl_app.run.tokenization import tokenizing
from hafl_app.training.settings import BaseSpec

DATA_PATH, TEXT_COLUMN, LABEL_COLUMN = "data-path", "text-column", "label-column"
MAX_LABELS, MAX_LABEL_LENGTH = "max-labels", "max-label-length"
_COLUMNS = {TEXT_COLUMN: OwnFile.text_column, LABEL_COLUMN: OwnFile.label_column}


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
        ``data-path``, ``text-column`` and ``label-column``, and ``max-labels`` and
        ``max-label-length`` of what may leave. It comes from the operator, so it needs no
        permission; a run config, which does not, chooses no column.

    Raises
    ------
    hafl_app.client.permissions.NotAllowedError
        If the run names another column than the operator.
    hafl_app.client.node_config.NodeConfigError
        If a limit is no whole number in its range.
    """
    path, dataset = node_config.get(DATA_PATH), settings.dataset
    if not path:
        return None
    if dataset.source == ON_DEVICE:  # other data sets have columns of their own
        _refuse_column(node_config, TEXT_COLUMN, "dataset.text_column", dataset.text_column)
        _refuse_column(node_config, LABEL_COLUMN, "dataset.label_column", dataset.label_column)
    most_labels = whole_number(node_config, MAX_LABELS, 1, MOST_LABELS)
    longest_label = whole_number(node_config, MAX_LABEL_LENGTH, 1, LONGEST_LABEL)
    return OwnFile(
        str(path),
        _column(node_config, TEXT_COLUMN),
        _column(node_config, LABEL_COLUMN),
        dataset.max_examples,
        dataset.data_seed,
        OwnFile.max_labels if most_labels is None else most_labels,
        OwnFile.max_label_length if longest_label is None else longest_label,
    )


def _column(node_config: Mapping[str, Any], key: str) -> str:
    return str(node_config.get(key, _COLUMNS[key]))


def _refuse_column(node_config: Mapping[str, Any], key: str, setting: str, asked: str) -> None:
    """Refuse a run that names a column, unless the node's operator has named one."""
    if key not in node_config and asked != _COLUMNS[key]:
        raise NotAllowedError(
            f"{setting}={asked!r}: a run names no column of this node's file; {key} in its "
            f"--node-config does, {_COLUMNS[key]!r} by default"
        )


def own_share(settings: Settings, file: OwnFile, label_names: Sequence[str] | None) -> Share:
    """Return a node's own data under the run's classes, or under its own if there are none yet.

    Raises
    ------
    hafl_app.data.errors.UnfitDataError
        If a column is missing, a label is not among the run's, or the labels may not leave.
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
