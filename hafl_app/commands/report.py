"""`hafl report`: tables and figures over runs, sweeps and comparisons, as pages."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hafl_app.cli import run_script
from hafl_app.printable import printable
from hafl_app.reports.folders import find_runs


def main(folders: Sequence[Path], output: Path, baseline: str, figures: str) -> int:
    """Write a report and say where; return the exit code.

    Parameters
    ----------
    folders
        Each a run's, a sweep's or a comparison's, or one above such.
    output
        Folder of the report.
    baseline
        Name of the runs that others are compared with; empty: chosen.
    figures
        Format of the figures' files.
    """
    return run_script(lambda: _report(folders, output, baseline, figures))


def _report(folders: Sequence[Path], output: Path, baseline: str, figures: str) -> int:
    from hafl_app.reports.output import check_output  # noqa: PLC0415

    check_output(output)
    find_runs(folders)
    # They take seconds: not before a typo.
    from hafl_app.reports.content import report_on  # noqa: PLC0415
    from hafl_app.reports.writing import write_report  # noqa: PLC0415

    report = report_on(folders, baseline)
    write_report(report, output, figures)
    for line in report.left_out:
        print(f"warning: left out: {printable(line, 2000)}", file=sys.stderr)
    for chapter in report.chapters:
        for table in chapter.tables:
            print(f"\n{table.title}\n\n{table.markdown()}")
    print(
        f"\nWritten: report.html, report.md, report.tex and figures in {shlex.quote(str(output))}"
    )
    return 0
