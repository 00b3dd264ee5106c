"""Logging of a run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from types import TracebackType
from typing import Final, TextIO

from hafl_app.printable import printable
from hafl_app.tracking.as_text import is_terminal, wrapped

_FORMAT: Final = "%(levelname)s %(name)s: %(message)s"
_LONGEST_MESSAGE: Final = 4000
_INDENT: Final = "    "


class LogFormatter(logging.Formatter):
    """One line a record, whatever the message quotes; a traceback follows indented.

    Messages quote what others wrote: names of devices, labels, paths, reasons of errors. No line
    of a log that starts at its margin is theirs, and none moves a cursor.

    Parameters
    ----------
    wraps
        Go on below where a terminal of 80 columns would break the line.
    """

    def __init__(self, *, wraps: bool = False) -> None:
        super().__init__(_FORMAT)
        self._wraps = wraps

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the record on one line."""
        record.message = printable(record.message, _LONGEST_MESSAGE)
        line = super().formatMessage(record)
        return "\n".join(wrapped(line, _INDENT)) if self._wraps else line

    def formatException(
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None]
        | tuple[None, None, None],
    ) -> str:
        """Return the traceback, its lines indented and without control characters."""
        lines = super().formatException(ei).splitlines()
        return "\n".join(_INDENT + _indented(line) for line in lines)


def _indented(line: str) -> str:
    text = line.lstrip()
    return line[: len(line) - len(text)].replace("\t", _INDENT) + printable(text, _LONGEST_MESSAGE)


def show_log() -> None:
    """Print what this project logs from level INFO on, unless a handler already shows it."""
    logger = logging.getLogger("hafl_app")
    if logger.level != logging.INFO:  # setting it clears logging's own cache every time
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(LogFormatter(wraps=is_terminal(handler.stream)))
        logger.addHandler(handler)


@contextmanager
def output_to(log: TextIO) -> Iterator[None]:
    """Send what this project prints and logs to a file."""
    logger = logging.getLogger("hafl_app")
    handler = logging.StreamHandler(log)
    handler.setFormatter(LogFormatter())
    logger.addHandler(handler)
    try:
        with redirect_stdout(log):
            yield
    finally:
        logger.removeHandler(handler)
