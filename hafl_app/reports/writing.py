"""Reports as files: Markdown, one HTML file that needs nothing else, LaTeX, and the figures."""

import base64
import io
from functools import partial
from pathlib import Path
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from hafl_app.disk import naming
from hafl_app.printable import markdown_text, printable
from hafl_app.reports.content import Report
from hafl_app.reports.figures.style import save, write_figure
from hafl_app.reports.output import FIGURES, HTML, LATEX, MARKDOWN
from hafl_app.reports.pictures import Picture
from hafl_app.reports.tables import latex_text

_LONGEST: Final = 2000


def write_report(report: Report, folder: Path, figures: str) -> None:
    """Write a report into a folder, over an earlier one.

    Parameters
    ----------
    figures
        Format of the figures' files, ``svg``, ``pdf`` or ``png``; in the HTML file they are SVG.

    Raises
    ------
    OSError
        If the disk does not take it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    addresses = {}
    for picture in (picture for chapter in report.chapters for picture in chapter.pictures):
        path = folder / FIGURES / f"{picture.name}.{figures}"
        save(picture.figure, path)
        addresses[picture.name] = f"{FIGURES}/{path.name}"
    environment = Environment(
        loader=PackageLoader("hafl_app.reports"),
        autoescape=lambda name: bool(name and name.startswith(HTML)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "markdown": partial(markdown_text, longest=_LONGEST),
        "latex": latex_text,
        "shown": partial(printable, longest=_LONGEST),
        "svg_address": svg_address,
    }
    for name in (MARKDOWN, LATEX, HTML):
        text = environment.get_template(f"{name}.jinja").render(report=report, figures=addresses)
        with naming(folder / name):
            (folder / name).write_text(text + "\n", encoding="utf-8")


def svg_address(picture: Picture) -> str:
    """Return a figure as an address that holds all of it, so that a page shows it offline.

    As an image, not as a part of the page, so that nothing in it could run.
    """
    stream = io.BytesIO()
    write_figure(picture.figure, stream, "svg")
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
