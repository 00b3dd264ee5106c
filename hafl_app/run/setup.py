"""Setup before round 1: wait for the nodes, and agree with them on the classes."""

import logging
from collections.abc import Iterable, Sequence

from flwr.serverapp import Grid

from hafl_app.config.schema import Settings
from hafl_app.data.central import CentralFile, central_label_names
from hafl_app.data.combinations import ON_DEVICE
from hafl_app.data.conversations import ONE_CLASS
from hafl_app.data.labels import MOST_LABELS, checked_label_names, union_of_labels
from hafl_app.data.shares import CentralText
from hafl_app.run import build
from hafl_app.run.tokenization import pair_tokenizer, tokenizing
from hafl_app.server.coordinator import Strategy
from hafl_app.server.node_directory import NodeDirectory
from hafl_app.server.numbering import Numbering
from hafl_app.training.locate import weights_note
from hafl_app.training.settings import ModelSettings
from hafl_app.wire.node_profile import NodeProfile

_LOGGER = logging.getLogger(__name__)


def warn_of_weights(model: ModelSettings) -> None:
    """Log a line if the base model was never trained, or its weights went through few bits."""
    if model.random_weights:
        _LOGGER.warning(
            "model %s has random weights: its scores only compare with its own", model.title
        )
    if note := weights_note(model):
        _LOGGER.warning("model %s: its weights were %s", model.title, note)


def central_text(settings: Settings, label_names: Sequence[str]) -> CentralText:
    """Return the data that the server evaluates on.

    Raises
    ------
    hafl_app.data.errors.DataError
        If the server's test file cannot be read or does not fit ``label_names``.
    """
    if settings.dataset.source != ON_DEVICE:
        # The central splits are the same whatever the number of clients.
        return build.federated_text(settings, settings.federation.num_clients)
    how = tokenizing(build.base_spec(settings), settings.dataset.max_length)
    pairs = pair_tokenizer(build.base_spec(settings), settings.dataset.max_length)
    return CentralFile(settings.dataset, label_names, tokenize_pairs=pairs, **how)


def wait_for_nodes(
    grid: Grid,
    settings: Settings,
    strategy: Strategy,
    label_names: tuple[str, ...] | None,
    numbering: Numbering,
) -> CentralText:
    """Query the nodes, agree on the classes, and return the server's data.

    Parameters
    ----------
    label_names
        The run's classes; None for those of all connected nodes and of the test file.
    numbering
        Numbers of the nodes in this run.

    Raises
    ------
    hafl_app.server.method.StrategyError
        If the method cannot serve these nodes.
    TimeoutError
        If no node answers.
    hafl_app.data.errors.DataError
        If there is no set of classes, or the server's data do not fit it.
    """
    directory = build.node_directory(settings, label_names, numbering)
    profiles = strategy.coordinator.participation.wait_for_nodes(grid, directory)
    if label_names is None:
        label_names = label_names_of_all(settings, directory, profiles)
        directory.label_names = label_names
    return central_text(settings, label_names)


def known_label_names(settings: Settings) -> tuple[str, ...] | None:
    """Return the run's classes from settings or central data; None if the nodes name them.

    Raises
    ------
    hafl_app.data.errors.DataError
        If there are fewer than two, they are too many or too long, or the data cannot be read.
    """
    if settings.dataset.source != ON_DEVICE:
        return build.federated_text(settings, settings.federation.num_clients).label_names
    if settings.dataset.has_conversations:
        return (ONE_CLASS,)
    names = settings.dataset.label_names
    return None if names is None else checked_label_names(names, "dataset.label_names")


def label_names_of_all(
    settings: Settings, directory: NodeDirectory, profiles: Iterable[NodeProfile]
) -> tuple[str, ...]:
    """Return the classes of the nodes and of the server's test file together.

    Nodes with the fewest classes come first; one whose classes would be too many in all is left
    out, so that no node can end the run for the others.

    Raises
    ------
    hafl_app.data.errors.DataError
        If there are fewer than two, or too many, or the test file cannot be read.
    """
    central = central_label_names(settings.dataset)
    names = set(central)
    for profile in sorted(profiles, key=lambda p: (len(p.label_names), p.partition_id)):
        if len(more := names | set(profile.label_names)) > MOST_LABELS:
            directory.refuse(
                profile.node_id,
                f"its {len(profile.label_names)} classes and those of the other nodes are "
                f"{len(more)}, expected at most {MOST_LABELS}",
            )
        else:
            names = more
    return union_of_labels([names])
