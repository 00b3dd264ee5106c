"""Folder of a report: the names of its files, and the refusal of one that holds something else."""

from pathlib import Path
from typing import Final

HTML: Final = "report.html"
MARKDOWN: Final = "report.md"
LATEX: Final = "report.tex"
FIGURES: Final = "figures"


class OutputError(ValueError):
    """A folder that a report must not be written into; the message is one line."""


def check_output(folder: Path) -> None:
    """Refuse a folder that holds something else than a report.

    Raises
    ------
    OutputError
        In one line.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--output {folder}: a file; expected a folder, or a new name")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKDOWN).is_file():
        raise OutputError(f"--output {folder}: it holds something else than a report")
