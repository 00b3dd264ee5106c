"""One client's data and the server's data, wherever they come from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hafl_app.data.account import DataAccount
from hafl_app.data.pairs import Pairs
from hafl_app.data.text import EncodedText


@dataclass(frozen=True)
class Share:
    """The data of one client.

    Parameters
    ----------
    label_names
        Name of each class.
    num_examples
        Rows that it trains on.
    train, holdout
        Return the rows that it trains on, and those that it evaluates on; the texts are tokenized
        when they are first asked for.
    holdout_pairs
        Returns the latter as prompts with answers; None where the data have no answers.
    """

    label_names: tuple[str, ...]
    num_examples: int
    train: Callable[[], EncodedText]
    holdout: Callable[[], EncodedText]
    holdout_pairs: Callable[[], Pairs] | None = None


class CentralText(Protocol):
    """The data that the server scores the global adapter on; either split may have no rows."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Name of each class."""

    def account(self, *, by_tokens: bool) -> DataAccount:
        """Count rows kept and dropped, and the classes of each client that is known.

        Parameters
        ----------
        by_tokens
            Whether to tokenize prompts, to know which rows have no room for an answer.
        """

    def example(self) -> EncodedText | None:
        """Return a row that a client trains on, if the server has it and it has an answer."""

    @property
    def validation(self) -> EncodedText:
        """Rows for choosing a round."""

    @property
    def test(self) -> EncodedText:
        """The test set."""
