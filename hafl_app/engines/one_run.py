"""One run on this machine, on the engine that its settings name."""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from hafl_app.config.compose import compose, quoted
from hafl_app.config.schema import Settings
from hafl_app.run.run_folder import check_new
from hafl_app.tracking.as_text import is_terminal, wrapped
from hafl_app.tracking.mlflow import absolute_uri

# What Flower says of its own start, which `flower.log` keeps: nothing of it is for this command.
_CHATTER: Final = re.compile(
    r"(INFO|WARNING) :  |Using SuperLink|Successfully (started|installed) "
)


def run_once(overrides: Sequence[str], folder: Path) -> None:
    """Run one federation and leave its results in ``folder``.

    Raises
    ------
    hafl_app.run.run_folder.RunFolderError
        If an earlier run would be lost; nothing is written then.
    hafl_app.run.run_lock.RunLockedError
        If another process is still writing the folder.
    """
    settings = compose(overrides)
    if not settings.resume:
        check_new(folder)
    overrides = [*_with_absolute_paths(overrides, settings), f"output_dir={quoted(folder)}"]
    folder.mkdir(parents=True, exist_ok=True)
    if settings.engine == "inprocess":
        from hafl_app.engines.in_process import run_federation  # noqa: PLC0415  takes seconds

        run_federation(overrides)
    else:
        _run_on_ray(overrides, settings, folder)


def _with_absolute_paths(overrides: Sequence[str], settings: Settings) -> list[str]:
    """Add overrides that make local paths absolute: the apps run in other folders."""
    paths = {
        "dataset.path": settings.dataset.path,
        "dataset.test_path": settings.dataset.test_path,
        "model.path": settings.model.path,
        "resume": settings.resume,
    }
    tracking = settings.tracking
    store = absolute_uri(tracking.uri) if tracking.mlflow else None
    return [
        *overrides,
        *([f"tracking.uri={quoted(store)}"] if store else []),
        *(
            f"{name}={quoted(Path(path).expanduser().absolute())}"
            for name, path in paths.items()
            if path and Path(path).expanduser().exists()
        ),
    ]


def _run_on_ray(overrides: Sequence[str], settings: Settings, folder: Path) -> None:
    from hafl_app.engines.app_folder import app_folder  # noqa: PLC0415
    from hafl_app.engines.flower_run import (  # noqa: PLC0415
        flwr_run,
        own_superlink,
        resources_for,
    )
    from hafl_app.engines.ray_cluster import check_shares, cluster_address  # noqa: PLC0415
    from hafl_app.engines.ray_cohorts import (  # noqa: PLC0415
        resources_of_cohorts,
        trainer_environment,
    )

    federation = settings.federation
    address = cluster_address(federation.ray_address, os.environ)
    if trainers := count_trainers(settings):
        resources = resources_of_cohorts(settings, trainers)
    else:
        if address:
            check_shares(federation.client_cpus, federation.client_gpus)
        resources = resources_for(
            federation.num_clients,
            settings.client.num_threads,
            _client_gpus(settings),
            federation.client_cpus,
            federation.client_gpus,
        )
    _say(f"Simulating with {resources.to_federation_config()}")
    more = trainer_environment(trainers)
    with (
        own_superlink(folder / "superlink.log", address, more) as environment,
        (folder / "flower.log").open("w") as log,
        app_folder() as app,
    ):

        def on_line(line: str) -> None:
            if not _CHATTER.match(line):
                _say(line)
            log.write(f"{line}\n")

        flwr_run(app, environment, {"overrides": shlex.join(overrides)}, resources, on_line)


def count_trainers(settings: Settings) -> int:
    """Return how many processes train clients together; 0: each client trains in its own.

    Raises
    ------
    hafl_app.config.overrides.SettingsError
        If so many clients cannot train together on this machine.
    """
    from hafl_app.engines.ray_cohorts import trainers_for, trains_together  # noqa: PLC0415

    if settings.engine != "ray" or not trains_together(settings):
        return 0
    address = settings.federation.ray_address or os.environ.get("RAY_ADDRESS")
    return trainers_for(settings, _client_gpus(settings), address)


def _client_gpus(settings: Settings) -> int:
    import torch  # noqa: PLC0415  takes seconds

    return 0 if settings.client.device == "cpu" else torch.cuda.device_count()


def _say(line: str) -> None:
    lines = wrapped(line) if is_terminal(sys.stdout) else [line]
    print("\n".join(lines), flush=True)  # noqa: T201
