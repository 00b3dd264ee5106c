"""A node's own data file, named in its ``--node-config``."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hafl_app.client.node_config import NodeConfigError, whole_number
from hafl_app.client.permissions import NotAllowedError
from hafl_app.config.schema import Settings
from hafl_app.data.combinations import ON_DEVICE
from hafl_app.data.labels import LONGEST_LABEL, MOST_LABELS
from hafl_app.data.own_conversations import OwnConversations
from hafl_app.data.own_file import OwnFile, OwnText
from hafl_app.data.settings import DatasetSettings
from hafl_app.data.shares import Share
from hafl_app.fields import choices_of
from hafl_app.metrics import CAUSAL_LM
from hafl_app.run import build
from hafl_app.run.tokenization import pair_tokenizer, tokenizing
from hafl_app.training.settings import BaseSpec

DATA_PATH, TEXT_COLUMN, LABEL_COLUMN = "data-path", "text-column", "label-column"
MAX_LABELS, MAX_LABEL_LENGTH = "max-labels", "max-label-length"
DATA_FORMAT, MAX_LENGTH, MAX_DATA_MB = "data-format", "max-length", "max-data-mb"
_COLUMNS = {
    TEXT_COLUMN: OwnFile.text_column,
    LABEL_COLUMN: OwnFile.label_column,
    DATA_FORMAT: OwnFile.format,
}
_MOST = 10**9


@dataclass(frozen=True)
class _ReadOptions:
    """Options that decide a node's rows and tokens beside its file."""

    holdout_fraction: float
    seed: int
    spec: BaseSpec
    max_length: int
    system_prompt: str | None


def own_file(settings: Settings, node_config: Mapping[str, Any]) -> OwnFile | None:
    """Return the file that a node's operator named, or None if the node has none.

    Parameters
    ----------
    node_config
        ``data-path``, ``text-column`` and ``label-column``, or ``data-format`` of conversations;
        ``max-labels`` and ``max-label-length`` of what may leave; ``max-length`` of a row and
        ``max-data-mb`` of the file. It comes from the operator, so it needs no permission; a run
        config, which does not, chooses no column.

    Raises
    ------
    hafl_app.client.permissions.NotAllowedError
        If the run names another column than the operator.
    hafl_app.client.node_config.NodeConfigError
        If a limit is no whole number in its range, or the format is none.
    """
    path, dataset = node_config.get(DATA_PATH), settings.dataset
    if not path:
        return None
    if dataset.source == ON_DEVICE:  # other data sets have columns of their own
        _refuse_columns(node_config, dataset)
    limits = _limits(node_config)
    return OwnFile(
        str(path),
        _column(node_config, TEXT_COLUMN),
        _column(node_config, LABEL_COLUMN),
        dataset.max_examples,
        dataset.data_seed,
        format=_format(node_config),
        **limits,
    )


def _limits(node_config: Mapping[str, Any]) -> dict[str, int]:
    """Return the limits that the operator has set, by field of `OwnFile`."""
    limits = {
        "max_labels": whole_number(node_config, MAX_LABELS, 1, MOST_LABELS),
        "max_label_length": whole_number(node_config, MAX_LABEL_LENGTH, 1, LONGEST_LABEL),
        "max_length": whole_number(node_config, MAX_LENGTH, 1, _MOST),
        "max_megabytes": whole_number(node_config, MAX_DATA_MB, 1, _MOST),
    }
    return {name: limit for name, limit in limits.items() if limit is not None}


def _format(node_config: Mapping[str, Any]) -> str:
    given = _column(node_config, DATA_FORMAT)
    known = [name for name in choices_of(DatasetSettings, "format") if name != "columns"]
    if given not in known:
        raise NodeConfigError(DATA_FORMAT, f"one of {', '.join(known)}", given)
    return given


def _column(node_config: Mapping[str, Any], key: str) -> str:
    return str(node_config.get(key, _COLUMNS[key]))


def _refuse_columns(node_config: Mapping[str, Any], dataset: DatasetSettings) -> None:
    """Refuse a run that names columns of the file, or a format, that the operator has not named."""
    _refuse_column(node_config, TEXT_COLUMN, "dataset.text_column", dataset.text_column)
    if dataset.has_conversations:
        _refuse_column(node_config, DATA_FORMAT, "dataset.format", dataset.format)
    else:
        _refuse_column(node_config, LABEL_COLUMN, "dataset.label_column", dataset.label_column)


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
    dataset, spec = settings.dataset, build.base_spec(settings)
    options = _ReadOptions(
        dataset.holdout_fraction,
        settings.seed,
        spec,
        min(dataset.max_length, file.max_length or dataset.max_length),
        dataset.system_prompt,
    )
    read = _own_conversations if spec.task == CAUSAL_LM.name else _own_text
    return read(file, file.version(), options).share(label_names)


@functools.lru_cache(maxsize=8)
def _own_conversations(
    file: OwnFile, version: tuple[int, int], options: _ReadOptions
) -> OwnConversations:
    del version  # part of the key: a process that lives on must see that the file was replaced
    how = tokenizing(options.spec, options.max_length)
    pairs = pair_tokenizer(options.spec, options.max_length)
    assert pairs is not None  # of a model that learns answers
    return OwnConversations(
        file,
        system_prompt=options.system_prompt,
        holdout_fraction=options.holdout_fraction,
        seed=options.seed,
        tokenize_pairs=pairs,
        tokenizer_key=how["tokenizer_key"],
        cache=how["cache"],
    )


@functools.lru_cache(maxsize=8)
def _own_text(file: OwnFile, version: tuple[int, int], options: _ReadOptions) -> OwnText:
    del version  # as above
    return OwnText(
        file,
        holdout_fraction=options.holdout_fraction,
        seed=options.seed,
        **tokenizing(options.spec, options.max_length),
    )
