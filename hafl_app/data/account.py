"""Account of a run's data: rows kept and dropped, and the classes of each client."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ClientRows:
    """Rows of one client.

    Parameters
    ----------
    train, holdout
        Rows that it trains on, and that it evaluates on.
    labels
        Training rows of each class that it has, by the class's name.
    """

    train: int
    holdout: int
    labels: Mapping[str, int]


@dataclass(frozen=True)
class DataAccount:
    """Rows and classes of a data set, as the run uses them.

    Parameters
    ----------
    label_names
        The classes, in their order.
    read
        Rows of the training and of the test data, before any is dropped.
    dropped
        Reason to number of rows that nothing uses, none of them 0.
    validation, test
        Rows that the server scores on.
    labels
        Rows of each class that clients train on, by name; also of a class without any.
    clients
        By partition; empty where the data stay on the nodes.
    tokens, answer_tokens, cut
        Of prompts with answers that clients train on: tokens in all, those that count in the loss,
        and rows that lost some to ``dataset.max_length``; 0 where nothing was tokenized.
    notes
        Changes of the data and other facts worth a look, in words.
    """

    label_names: tuple[str, ...]
    read: Mapping[str, int]
    dropped: Mapping[str, int]
    validation: int
    test: int
    labels: Mapping[str, int] = field(default_factory=dict)
    clients: tuple[ClientRows, ...] = ()
    notes: tuple[str, ...] = ()
    tokens: int = 0
    answer_tokens: int = 0
    cut: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)
