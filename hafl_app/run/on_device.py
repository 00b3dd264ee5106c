"""Data on the device: which file a node reads, and on which classes nodes and server agree."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from flwr.serverapp import Grid

from hafl_app.config.schema import Settings
from hafl_app.data.central import CentralFile, central_label_names
from hafl_app.data.labels import checked_label_names, union_of_labels
from hafl_app.data.own_file import OwnFile, OwnText
from hafl_app.data.shares import CentralText, Share
from hafl_app.run import build
from hafl_app.server.numbering import Numbering
from hafl_app.strategies.hooks import FlowerHooks
from hafl_app.training.base_model import BaseSpec
from hafl_app.wire.node_profile import NodeProfile

ON_DEVICE: Final = "on_device"
DATA_PATH, TEXT_COLUMN, LABEL_COLUMN = "data-path", "text-column", "label-column"


@dataclass(frozen=True)
class _HowItIsRead:
    """What decides a node's rows and tokens beside its file."""

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
    how = _HowItIsRead(
        dataset.holdout_fraction, settings.seed, build.base_spec(settings), dataset.max_length
    )
    return _own_text(file, file.version(), how).share(label_names)


@functools.lru_cache(maxsize=8)
def _own_text(file: OwnFile, version: tuple[int, int], how: _HowItIsRead) -> OwnText:
    del version  # part of the key: a process that lives on must see that the file was replaced
    return OwnText(
        file,
        holdout_fraction=how.holdout_fraction,
        seed=how.seed,
        **build.tokenizing(how.spec, how.max_length),
    )


def central_text(settings: Settings, label_names: Sequence[str]) -> CentralText:
    """Return the data that the server scores on.

    Raises
    ------
    hafl_app.data.errors.DataError
        If the server's test file cannot be read or does not fit ``label_names``.
    """
    if settings.dataset.source != ON_DEVICE:
        # The central splits are the same whatever the number of clients.
        return build.federated_text(settings, settings.federation.num_clients)
    tokenizing = build.tokenizing(build.base_spec(settings), settings.dataset.max_length)
    return CentralFile(build.text_source(settings), label_names, **tokenizing)


def meet(
    grid: Grid,
    settings: Settings,
    strategy: FlowerHooks,
    label_names: tuple[str, ...] | None,
    numbering: Numbering,
) -> CentralText:
    """Ask the nodes what they are, and return the server's data once the classes are agreed.

    Parameters
    ----------
    label_names
        The run's classes; None for those of all nodes that are there, and of the test file.
    numbering
        Numbers that nodes have been given in this run.

    Raises
    ------
    hafl_app.strategies.hooks.StrategyError
        If the method cannot serve these nodes.
    TimeoutError
        If no node answers.
    hafl_app.data.errors.DataError
        If there is no set of classes, or the server's data do not fit it.
    """
    directory = build.node_directory(settings, label_names, numbering)
    profiles = strategy.meet(grid, build.federation_options(settings), directory)
    if label_names is None:
        label_names = label_names_of_all(settings, profiles)
        directory.label_names = label_names
    return central_text(settings, label_names)


def known_label_names(settings: Settings) -> tuple[str, ...] | None:
    """Return the run's classes if settings or central data say them; None if the nodes must.

    Raises
    ------
    hafl_app.data.errors.DataError
        If there are fewer than two, they are too many or too long, or the data cannot be read.
    """
    if settings.dataset.source != ON_DEVICE:
        return build.federated_text(settings, settings.federation.num_clients).label_names
    names = build.text_source(settings).label_names
    return None if names is None else checked_label_names(names, "dataset.label_names")


def label_names_of_all(settings: Settings, profiles: Iterable[NodeProfile]) -> tuple[str, ...]:
    """Return the classes of the nodes and of the server's test file together.

    Raises
    ------
    hafl_app.data.errors.DataError
        If there are fewer than two, or too many, or the test file cannot be read.
    """
    central = central_label_names(build.text_source(settings))
    return union_of_labels([central, *(profile.label_names for profile in profiles)])
