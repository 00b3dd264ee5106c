"""The error a user can mend, and the hint at the name that was meant."""

import difflib
from collections.abc import Iterable
from typing import Any, Final

_LONGEST_NAME: Final = 30  # of a column, in a message


class DataError(ValueError):
    """A user's mistake in the data settings or files, described in one line."""


class UnfitDataError(DataError):
    """A node's data that do not fit the run, which is the server's business too.

    The message holds nothing of the data and may leave the node.

    Parameters
    ----------
    details
        Details for the data's owner, which may quote them: for the node's own log.
    """

    def __init__(self, message: str, details: str) -> None:
        super().__init__(message)
        self.details = details


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Hint at the candidate nearest to ``name``, to be appended to a message.

    Returns
    -------
    str
        ``"; did you mean '...'?"``, or nothing if no candidate is similar.
    """
    close = difflib.get_close_matches(name, list(candidates), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def require_column(columns: Iterable[Any], name: str, setting: str, origin: str) -> None:
    """Check that a column exists.

    Raises
    ------
    DataError
        If it does not; the message lists those that do.
    """
    names = [str(column) for column in columns]
    if name not in names:
        raise DataError(
            f"{setting}: {origin} has no column {name!r}, only {', '.join(map(_cut, names))}"
            f"{nearest(name, names)}"
        )


def _cut(name: str) -> str:
    # In a file without a header the names are private data.
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
