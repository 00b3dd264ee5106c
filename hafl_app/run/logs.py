"""Logging of a run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

FORMAT = "%(levelname)s %(name)s: %(message)s"


def show_log() -> None:
    """Print what this project logs from level INFO on, unless a handler already shows it."""
    logger = logging.getLogger("hafl_app")
    if logger.level != logging.INFO:  # setting it clears logging's own cache every time
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(FORMAT))
        logger.addHandler(handler)


@contextmanager
def output_to(log: TextIO) -> Iterator[None]:
    """Send what this project prints and logs to a file."""
    logger = logging.getLogger("hafl_app")
    handler = logging.StreamHandler(log)
    handler.setFormatter(logging.Formatter(FORMAT))
    logger.addHandler(handler)
    try:
        with redirect_stdout(log):
            yield
    finally:
        logger.removeHandler(handler)
