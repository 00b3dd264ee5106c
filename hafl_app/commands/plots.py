"""`hafl plots`: figures beyond those that every run draws."""

from collections.abc import Sequence
from pathlib import Path

from hafl_app.cli import run_script


def rank_collapse(settings: Sequence[str]) -> int:
    """Run the methods of an experiment and draw their energies; return the exit code."""
    return run_script(lambda: _rank_collapse(settings))


def curves(folders: Sequence[Path], output: Path) -> int:
    """Draw the test scores of finished runs; return the exit code."""
    return run_script(lambda: _curves(folders, output))


def influence(folder: Path, output: Path) -> int:
    """Draw how much of the step the clients of each rank decide; return the exit code."""
    return run_script(lambda: _influence(folder, output))


def _influence(folder: Path, output: Path) -> int:
    from hafl_app.tracking.influence import draw_influence, influence_of_run  # noqa: PLC0415

    rounds = influence_of_run(folder)
    if not draw_influence(rounds, output, f"{folder.name}: who decides the adapter's step"):
        raise ValueError(f"{folder}: all clients that have a known influence are of one rank")
    print(f"Written: {output}")
    return 0


def _rank_collapse(settings: Sequence[str]) -> int:
    from hafl_app.experiments.command import parse_command  # noqa: PLC0415
    from hafl_app.experiments.comparison import check_first  # noqa: PLC0415

    command = parse_command(settings, experiment="rank_collapse")
    check_first(command)
    from hafl_app.experiments.collapse import rank_collapse as draw  # noqa: PLC0415  takes seconds

    draw(command, lambda text: print(text, flush=True))
    return 0


def _curves(folders: Sequence[Path], output: Path) -> int:
    from hafl_app.experiments.results import read_curve  # noqa: PLC0415

    runs = {str(folder): [read_curve(folder)] for folder in folders}
    from hafl_app.experiments.figures import draw_comparison  # noqa: PLC0415  takes seconds

    draw_comparison({"": runs}, output, "Test scores")
    print(f"Written: {output}")
    return 0
