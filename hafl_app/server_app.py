"""ServerApp: run the federation that a Flower run config describes."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from hafl_app.config.compose import compose
from hafl_app.run.build import overrides_of_run
from hafl_app.run.federation import run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation over the grid's nodes."""
    overrides = overrides_of_run(context.run_config)
    run(grid, compose(overrides), overrides=overrides)
