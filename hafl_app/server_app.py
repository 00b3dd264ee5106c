"""ServerApp: compose the settings, build the objects, run the federation, report it."""

import logging
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from flwr.app import Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from hafl_app import assembly
from hafl_app.config.schema import Settings
from hafl_app.gains import lone_clients
from hafl_app.lowrank.factors import Adapter, initial_adapter
from hafl_app.reporting import RunReport
from hafl_app.strategies.alone import train_alone

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes."""
    run(grid, assembly.settings_of_run(context.run_config))


def run(
    grid: Grid,
    settings: Settings,
    *,
    on_round: Callable[[int, Adapter], None] | None = None,
) -> None:
    """Run a federation over the grid's nodes and write its results.

    Parameters
    ----------
    on_round
        Told the global adapter before the first round (0) and after every round.

    Raises
    ------
    hafl_app.strategies.base.StrategyError
        If the method cannot serve these nodes.
    hafl_app.strategies.base.RoundFailedError
        If nobody's training counted in a round.
    """
    assembly.show_log()
    # Flower tells of each round in a dozen lines; ours are told by the trackers.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    strategy = assembly.strategy(settings)
    folder = output_folder(settings)
    print(f"Output folder: {folder}", flush=True)  # noqa: T201  the log must name it
    # The central splits are the same whatever the number of clients.
    text = assembly.federated_text(settings, settings.federation.num_clients)
    classifier = assembly.classifier(settings, len(text.label_names))
    initial = initial_adapter(classifier.shapes(), strategy.max_rank, settings.seed).with_head(
        {} if settings.model.head == "local" else classifier.initial_head
    )
    report = RunReport(settings, strategy, text, classifier, folder)
    report.start()

    def evaluate(server_round: int) -> MetricRecord:
        metrics = report.evaluate(server_round)
        if on_round is not None:
            on_round(server_round, strategy.global_adapter)
        return metrics

    try:
        options = assembly.federation_options(settings)
        strategy.run(grid, initial, options, evaluate, report.on_client)
        lone = lone_clients(settings, strategy.directory.in_order())
        alone = train_alone(strategy, grid, initial, lone) if lone else []
        if lone and settings.federation.alone_at_max_rank:
            alone += train_alone(strategy, grid, initial, lone, strategy.max_rank)
        report.finish(alone)
    except BaseException as error:
        report.fail(f"{type(error).__name__}: {error}")
        raise


def output_folder(settings: Settings) -> Path:
    """Return the absolute folder of the run: `output_dir`, else one named by time and method."""
    if settings.output_dir is not None:
        return Path(settings.output_dir).expanduser().absolute()
    method = type(settings.strategy).__module__.rpartition(".")[2]
    now = datetime.now().astimezone()
    return Path("outputs").absolute() / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}-{method}"
