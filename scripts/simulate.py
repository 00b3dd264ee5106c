"""Run a federation on this machine: `python scripts/simulate.py strategy=hafl seed=1`.

`-m` sweeps: `python scripts/simulate.py -m strategy=hafl,zero_padding seed=0,1`.
`resume=FOLDER` or `resume=latest` resumes a run that stopped; other arguments change it.
Settings are Hydra overrides of `conf/`; `--help` lists the groups.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import FAILED, run_script  # noqa: E402
from hafl_app.config.compose import compose, quoted, register_schema  # noqa: E402
from hafl_app.config.overrides import unquoted  # noqa: E402
from hafl_app.config.schema import Settings  # noqa: E402
from hafl_app.printable import printable  # noqa: E402
from hafl_app.run.command_line import CommandLine  # noqa: E402
from hafl_app.run.going_on import key  # noqa: E402

_typed: list[str] = []
_failures: list[str] = []
_interruptions: list[str] = []


def resumed(line: CommandLine) -> CommandLine:
    """Return the command line of the run that ``resume=...`` asks for, else the same one.

    The settings are those of the run that goes on, then what else stands on the command line.

    Raises
    ------
    hafl_app.run.resumable_run.ResumeError
        If there is no such run, or it has no whole checkpoint, or these settings do not fit it.
    """
    given = [o.partition("=")[2] for o in line.overrides if key(o) == "resume"]
    if not given:
        return line
    from hafl_app.run.resumable_run import ResumeError, latest_run, require_checkpoint
    from hafl_app.run.run_folder import absolute

    if line.multirun:
        raise ResumeError("resume= resumes one run: leave out -m")
    if any(key(o) == "output_dir" for o in line.overrides):
        raise ResumeError("resume= goes on in the run's own folder: leave out output_dir=")
    name = unquoted(given[-1])
    if not name:
        raise ResumeError("resume=: expected the folder of a run, or latest")
    folder = latest_run(Path("outputs")) if name == "latest" else absolute(name)
    if (folder / "checkpoints").is_dir():
        _stop_what_is_left(folder)
    require_checkpoint(folder)
    from hafl_app.run.resuming import check_resumable, load_checkpoint  # takes seconds

    checkpoint = load_checkpoint(folder)
    own = ("resume", "output_dir")
    overrides = [o for o in checkpoint.state["overrides"] if key(o) not in own]
    overrides += [o for o in line.overrides if key(o) not in own]
    line = replace(line, overrides=(*overrides, f"resume={quoted(folder)}"))
    check_resumable(checkpoint, compose(line.jobs()[0]))
    return line


def _stop_what_is_left(folder: Path) -> None:
    """Stop the processes of a run whose `simulate.py` was killed."""
    from hafl_app.engines.processes import stop_abandoned_run
    from hafl_app.run.run_lock import RunLockedError, run_lock

    try:
        with run_lock(folder):
            return
    except RunLockedError as error:
        if not stop_abandoned_run(error.pid):
            raise
    print("stopped what the killed run had left behind", flush=True)


def with_absolute_paths(overrides: Sequence[str], settings: Settings) -> list[str]:
    """Add overrides that make local paths absolute: the apps run in other folders."""
    paths = {
        "dataset.path": settings.dataset.path,
        "dataset.test_path": settings.dataset.test_path,
        "model.path": settings.model.path,
        "resume": settings.resume,
    }
    return [
        *overrides,
        *(
            f"{name}={quoted(Path(path).expanduser().absolute())}"
            for name, path in paths.items()
            if path and Path(path).expanduser().exists()
        ),
    ]


def run_job(overrides: Sequence[str], folder: Path) -> None:
    """Run one federation and leave its results in ``folder``.

    Raises
    ------
    hafl_app.run.run_folder.RunFolderError
        If an earlier run would be lost; nothing is written then.
    hafl_app.run.run_lock.RunLockedError
        If another process is still writing the folder.
    """
    from hafl_app.run.run_folder import check_new

    settings = compose(overrides)
    if not settings.resume:
        check_new(folder)
    overrides = [*with_absolute_paths(overrides, settings), f"output_dir={quoted(folder)}"]
    folder.mkdir(parents=True, exist_ok=True)
    if settings.engine == "inprocess":
        from hafl_app.engines.in_process import run_federation

        run_federation(overrides)
    else:
        _run_on_ray(overrides, settings, folder)


def _run_on_ray(overrides: Sequence[str], settings: Settings, folder: Path) -> None:
    from hafl_app.engines.flower_run import flwr_run, own_superlink, resources_for
    from hafl_app.engines.ray_cluster import check_shares, cluster_address
    from hafl_app.engines.ray_cohorts import resources_of_cohorts, trainer_environment

    federation = settings.federation
    address = cluster_address(federation.ray_address, os.environ)
    if trainers := _trainers(settings):
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
    print(f"Simulating with {resources.to_federation_config()}", flush=True)
    more = trainer_environment(trainers)
    with (
        own_superlink(folder / "superlink.log", address, more) as environment,
        (folder / "flower.log").open("w") as log,
    ):

        def on_line(line: str) -> None:
            print(line, flush=True)
            log.write(f"{line}\n")

        flwr_run(ROOT, environment, {"overrides": shlex.join(overrides)}, resources, on_line)


def _trainers(settings: Settings) -> int:
    """Return how many processes train clients together; 0: each client trains in its own.

    Raises
    ------
    hafl_app.config.overrides.SettingsError
        If so many clients cannot train together on this machine.
    """
    from hafl_app.engines.ray_cohorts import trainers_for, trains_together

    if settings.engine != "ray" or not trains_together(settings):
        return 0
    address = settings.federation.ray_address or os.environ.get("RAY_ADDRESS")
    return trainers_for(settings, _client_gpus(settings), address)


def _client_gpus(settings: Settings) -> int:
    import torch

    return 0 if settings.client.device == "cpu" else torch.cuda.device_count()


@hydra.main(config_path=str(ROOT / "conf"), config_name="config", version_base="1.3")
def _hydra_job(config: DictConfig) -> None:
    """Run one job of the command line; a failed one does not stop a sweep."""
    del config  # composed again from the overrides, checked, wherever the apps run
    from hafl_app.run.going_on import RunWatch

    hydra_config = HydraConfig.get()
    overrides = [o for o in hydra_config.overrides.task if key(o) != "output_dir"]
    folder = Path(hydra_config.runtime.output_dir)
    watch = RunWatch(folder, ("python", sys.argv[0]), _typed)
    try:
        run_job(overrides, folder)
    except KeyboardInterrupt:
        _interruptions.append(watch.interrupted())
        raise
    except ValueError as error:  # refused: nothing was lost
        _failures.append(f"{type(error).__name__}: {error}")
        print(f"error: {printable(_failures[-1], 2000)}", file=sys.stderr, flush=True)
    except Exception as error:
        # One line: the log above it has the details.
        _failures.append(f"{type(error).__name__}: {error}")
        line = f"{printable(_failures[-1], 2000)}{watch.failed()}"
        print(f"error: {line}", file=sys.stderr, flush=True)


def main() -> int:
    """Check every job before the first one starts, run them, and say how it went."""
    _typed[:] = sys.argv[1:]
    return run_script(_run_jobs, lambda: "; ".join(_interruptions) or "interrupted")


def _run_jobs() -> int:
    line = CommandLine.of(sys.argv[1:])
    typed = line.overrides
    placed: list[str] = []
    if line.shows != "hydra":
        line = resumed(line)
        jobs = [compose(job) for job in line.jobs()]
        if not line.shows:
            from hafl_app.run.effects import without_effect
            from hafl_app.run.preflight import check

            for settings in jobs:
                check(settings)
                _trainers(settings)
            for warning in without_effect(jobs, typed):
                print(f"warning: {printable(warning)}", file=sys.stderr, flush=True)
            placed = line.placed(jobs)
    sys.argv[1:] = [*line.overrides, *placed, *line.flags]  # Hydra wants the flags together
    register_schema()
    _hydra_job()
    return FAILED if _failures else 0


if __name__ == "__main__":
    sys.exit(main())
