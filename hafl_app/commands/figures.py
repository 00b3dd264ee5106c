"""`hafl plots`: its commands, their options and their help."""

from collections.abc import Callable
from pathlib import Path

import click

from hafl_app.commands.arguments import FIGURE, FOLDER, PASSED_ON, Command, takes_settings
from hafl_app.commands.command_group import CommandGroup


@click.group(cls=CommandGroup)
def plots() -> None:
    """Draw figures of runs, beyond the one that every run draws.

    \b
      hafl plots curves outputs/first outputs/second
      hafl plots importance outputs/first --output importance.svg

    A figure is PNG, SVG or PDF, by the suffix of --output.
    """


def _takes_runs(name: str) -> Callable[[Command], Command]:
    """Give a command the folders of runs, and the figure to write."""

    def give(command: Command) -> Command:
        command = click.option(
            "--output", default=f"{name}.png", type=FIGURE, help=f"Figure ({name}.png)."
        )(command)
        return click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=FOLDER)(
            command
        )

    return give


@plots.command()
@_takes_runs("curves")
def curves(runs: tuple[Path, ...], output: Path) -> int:
    """Scores of runs, by round, by MB and by simulated time."""
    from hafl_app.commands.plots import curves as draw  # noqa: PLC0415

    return draw(runs, output)


@plots.command(context_settings=PASSED_ON)
@click.option("--output", default="labels.png", type=FIGURE, help="Figure (labels.png).")
@click.argument("arguments", nargs=-1, metavar="RUN | [SETTING=VALUE]...", type=click.UNPROCESSED)
def labels(arguments: tuple[str, ...], output: Path) -> int:
    """Training rows by class and client, of a run or before one.

    \b
      hafl plots labels outputs/first
      hafl plots labels dataset=synthetic partition=dirichlet
    """
    from hafl_app.commands.plots import labels as draw  # noqa: PLC0415

    return draw(arguments, output)


def _plot_of_runs(kind: str, help_text: str) -> None:
    def draw(runs: tuple[Path, ...], output: Path) -> int:
        from hafl_app.commands.plots import of_runs  # noqa: PLC0415

        return of_runs(kind, runs, output)

    plots.command(kind, help=help_text)(_takes_runs(kind)(draw))


_plot_of_runs("clients", "Last scores of the clients by rank, the worst tenth marked.")
_plot_of_runs("importance", "Importance of a run's layers and components over rounds.")
_plot_of_runs("ranks", "Ranks that clients trained over rounds.")
_plot_of_runs("energy", "Energy of the last global update by singular value.")
_plot_of_runs("bytes", "Bytes of training by client.")
_plot_of_runs("influence", "Share of each rank in the adapter's step, and in the data.")


@plots.command("rank-collapse", context_settings=PASSED_ON)
@takes_settings
def rank_collapse(arguments: tuple[str, ...]) -> int:
    """Run methods, draw their energy above the smallest rank.

    \b
      hafl plots rank-collapse seeds=0,1 federation.num_rounds=20

    The arguments are those of compare; experiment=rank_collapse is the default.
    """
    from hafl_app.commands.plots import rank_collapse as draw  # noqa: PLC0415

    return draw(arguments)
