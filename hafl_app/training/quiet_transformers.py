"""Transformers without its progress bars and reports."""

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers.utils import logging as hf_logging


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the progress bar, and the long report of the weights that a cut stack leaves out."""
    transformers_logging: Any = hf_logging
    verbosity = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
