"""ServerApp: run the federation that a Flower run config describes."""

import os
from typing import Any, cast

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from hafl_app.client.ray_trainers import choice_of, number_of_trainers
from hafl_app.config.compose import SettingsError, compose
from hafl_app.config.schema import Settings
from hafl_app.run.build import overrides_of_run
from hafl_app.run.federation import run
from hafl_app.training.cohort_choice import CohortChoice

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation over the grid's nodes."""
    overrides = overrides_of_run(context.run_config)
    settings, trainers = compose(overrides), number_of_trainers(os.environ)
    _check_cohort(settings, trainers)
    if trainers:
        grid = cast(Grid, _GridOfTrainers(grid, trainers))
    run(grid, settings, overrides=overrides)


def _check_cohort(settings: Settings, trainers: int) -> None:
    """Reject a number of clients to train together where nothing does."""
    if (settings.federation.cohort_clients or 1) > 1 and not trainers:
        raise SettingsError(
            f"federation.cohort={settings.federation.cohort}: clients train together only in a "
            "simulation that scripts/simulate.py starts; expected auto or 1"
        )


class _GridOfTrainers:
    """Flower's grid of a simulation, which also tells how many clients train together."""

    def __init__(self, grid: Grid, trainers: int) -> None:
        self._grid, self._trainers = grid, trainers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def cohort_choice(self) -> CohortChoice | None:
        """Return how many, once that is chosen."""
        return choice_of(self._trainers)

    def keep_cohort_choice(self, choice: CohortChoice) -> None:
        """Keep nothing: the number is given."""
