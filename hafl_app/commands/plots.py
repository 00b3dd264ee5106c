"""`hafl plots`: figures beyond those that every run draws."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hafl_app.cli import run_script
from hafl_app.printable import printable
from hafl_app.reports.folders import require_records
from hafl_app.tracking.as_text import Printer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hafl_app.reports.curve import Curve

_LONGEST_LABEL = 36


def rank_collapse(settings: Sequence[str]) -> int:
    """Run the methods of an experiment and draw their energies; return the exit code."""
    return run_script(lambda: _rank_collapse(settings))


def curves(folders: Sequence[Path], output: Path) -> int:
    """Draw the test scores of finished runs; return the exit code."""
    return run_script(lambda: _curves(folders, output))


def of_runs(kind: str, folders: Sequence[Path], output: Path) -> int:
    """Draw one figure of runs, see `hafl_app.reports.plots`; return the exit code."""
    return run_script(lambda: _of_runs(kind, folders, output))


def labels(arguments: Sequence[str], output: Path) -> int:
    """Draw the classes of each client of a run, or of settings; return the exit code."""
    return run_script(lambda: _labels(arguments, output))


def _rank_collapse(settings: Sequence[str]) -> int:
    from hafl_app.experiments.command import parse_command  # noqa: PLC0415
    from hafl_app.experiments.comparison import check_first  # noqa: PLC0415

    command = parse_command(settings, experiment="rank_collapse")
    check_first(command)
    from hafl_app.experiments.collapse import rank_collapse as draw  # noqa: PLC0415  takes seconds

    draw(command, lambda text: print(text, flush=True))
    return 0


def _curves(folders: Sequence[Path], output: Path) -> int:
    from hafl_app.reports.curve import read_curve  # noqa: PLC0415

    runs = {label: read_curve(folder) for label, folder in _labeled(folders).items()}
    metrics = {curve.metric.name for curve in runs.values()}
    if len(metrics) > 1:
        raise ValueError(f"runs with different metrics: {', '.join(sorted(metrics))}")
    from hafl_app.reports.figures.curves import comparison_figure  # noqa: PLC0415  takes seconds

    lines = {label: [curve] for label, curve in runs.items()}
    code = _write(comparison_figure({"": lines}, "Test scores"), output)
    _print_scores(runs)
    return code


def _labeled(folders: Sequence[Path]) -> dict[str, Path]:
    """Return the folders by the runs' names; by themselves where a name tells nothing apart."""
    from hafl_app.run.run_list import read_entry  # noqa: PLC0415

    names = [read_entry(folder).name for folder in folders]
    labels = [name if name and names.count(name) == 1 else "" for name in names]
    return {label or str(folder): folder for label, folder in zip(labels, folders, strict=True)}


def _print_scores(runs: Mapping[str, "Curve"]) -> None:
    """Print the test scores of the last and the best round, and the MB, of each run."""
    printer = Printer()
    rows = [
        [
            printable(label, _LONGEST_LABEL),
            str(len(curve.test) - 1),
            curve.metric.text(curve.test[-1]),
            curve.metric.text(curve.test[curve.best_round]),
            f"{curve.sent[-1]:,.1f}",
        ]
        for label, curve in runs.items()
    ]
    headings = ["rounds", "test, last", "test, best", "MB"]
    printer.table("Scores", {"": "left", **dict.fromkeys(headings, "right")}, rows)


def _of_runs(kind: str, folders: Sequence[Path], output: Path) -> int:
    require_records(folders)
    from hafl_app.reports.plots import figure_of_runs  # noqa: PLC0415  takes seconds

    return _write(figure_of_runs(kind, folders), output)


def _labels(arguments: Sequence[str], output: Path) -> int:
    settings = [argument for argument in arguments if "=" in argument]
    folders = [Path(argument) for argument in arguments if "=" not in argument]
    if folders and settings:
        raise ValueError(f"{folders[0]}: expected a run's folder, or settings, not both")
    if folders:
        return _of_runs("labels", folders, output)
    from hafl_app.config.compose import compose  # noqa: PLC0415
    from hafl_app.data.combinations import ON_DEVICE  # noqa: PLC0415
    from hafl_app.run.preflight import check_first  # noqa: PLC0415

    composed = compose(settings)
    if composed.dataset.source == ON_DEVICE:
        raise ValueError(f"dataset={ON_DEVICE}: what classes the nodes have is theirs to know")
    check_first(composed)
    from hafl_app.run.build import federated_text  # noqa: PLC0415  takes seconds

    text = federated_text(composed, composed.federation.num_clients)
    account = text.account(by_tokens=False)
    from hafl_app.reports.figures.heat_maps import labels_by_client  # noqa: PLC0415
    from hafl_app.reports.runs import labels_frame  # noqa: PLC0415

    frame = labels_frame(account.to_json())
    if frame.empty:
        raise ValueError(f"dataset={composed.dataset.source}: it has no classes")
    title = f"{composed.dataset.source}, {composed.partition.kind}, seed {composed.seed}"
    return _write(labels_by_client(frame, title), output)


def _write(figure: "Figure", output: Path) -> int:
    from hafl_app.reports.figures.style import save  # noqa: PLC0415

    save(figure, output)
    print(f"Written: {output}")
    return 0
