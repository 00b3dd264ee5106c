"""`hafl dashboard`: a local page of the runs below a folder."""

from collections.abc import Sequence
from pathlib import Path

from hafl_app.cli import run_script


def main(root: Path, host: str, port: int, names: Sequence[str], fleet: Path | None) -> int:
    """Serve the page until it is stopped; return the exit code.

    Parameters
    ----------
    root
        Folder with runs.
    host, port
        Where to listen; port 0 is a free one.
    names
        Further host names that browsers may ask for.
    fleet
        File that the fence of a deployment writes.
    """

    def job() -> int:
        from hafl_app.dashboard.server import serve  # noqa: PLC0415  takes seconds

        serve(root, host, port, names, fleet)
        return 0

    return run_script(job)
