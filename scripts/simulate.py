"""Run a federation on this machine: `python scripts/simulate.py strategy=hafl seed=1`.

`-m` sweeps: `python scripts/simulate.py -m strategy=hafl,zero_padding seed=0,1`.
`resume=FOLDER` or `resume=latest` resumes a run that stopped; other arguments change it.
Settings are Hydra overrides of `conf/`; `--help` lists the groups.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import FAILED, run_script  # noqa: E402
from hafl_app.config.compose import SettingsError, compose, quoted, register_schema  # noqa: E402
from hafl_app.config.schema import Settings  # noqa: E402

_failures: list[str] = []


def jobs_of(arguments: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every job that the command line asks for.

    Raises
    ------
    SettingsError
        If an argument is no override.
    """
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except HydraException as error:
        lines = str(error).splitlines()
        raise SettingsError(lines[0] if lines else "not an override") from error
    jobs = [job for batch in batches for job in batch]
    if len(jobs) > 1 and not {"-m", "--multirun"} & set(arguments):
        raise SettingsError(f"{shlex.join(overrides)}: {len(jobs)} jobs; add -m to run a sweep")
    return [[o for o in job if not o.startswith("hydra.")] for job in jobs]


def resumed(arguments: Sequence[str]) -> list[str]:
    """Return the command line of the run that ``resume=...`` asks for, else the same arguments.

    The settings are those of the run that goes on, then what else stands on the command line.

    Raises
    ------
    hafl_app.run.resuming.ResumeError
        If there is no such run, or it has no whole checkpoint, or these settings do not fit it.
    """
    given = [a.partition("=")[2] for a in arguments if a.startswith("resume=")]
    if not given:
        return list(arguments)
    from hafl_app.run.resuming import ResumeError, check_resumable, latest_run, load_checkpoint

    if {"-m", "--multirun"} & set(arguments):
        raise ResumeError("resume= resumes one run: leave out -m")
    folder = latest_run(Path("outputs")) if given[-1] == "latest" else Path(given[-1]).absolute()
    if (folder / "checkpoints").is_dir():
        _stop_what_is_left(folder)
    checkpoint = load_checkpoint(folder)
    own = ("resume=", "output_dir=")
    overrides = [o for o in checkpoint.state["overrides"] if not o.startswith(own)]
    overrides += [o for o in arguments if not o.startswith(own)]
    check_resumable(checkpoint, compose([o for o in overrides if not o.startswith("hydra.")]))
    return [*overrides, f"resume={quoted(folder)}", f"hydra.run.dir={quoted(folder)}"]


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
    """Run one federation and leave its results in ``folder``."""
    settings = compose(overrides)
    overrides = [*with_absolute_paths(overrides, settings), f"output_dir={quoted(folder)}"]
    from hafl_app.run.run_lock import check_unlocked

    check_unlocked(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if settings.engine == "inprocess":
        from hafl_app.engines.in_process import run_federation

        run_federation(overrides)
    else:
        _run_on_ray(overrides, settings, folder)


def _run_on_ray(overrides: Sequence[str], settings: Settings, folder: Path) -> None:
    import torch

    from hafl_app.engines.flower_run import flwr_run, own_superlink, resources_for
    from hafl_app.engines.ray_cluster import check_shares, cluster_address

    federation, client = settings.federation, settings.client
    address = cluster_address(federation.ray_address, os.environ)
    if address:
        check_shares(federation.client_cpus, federation.client_gpus)
    resources = resources_for(
        federation.num_clients,
        client.num_threads,
        0 if client.device == "cpu" else torch.cuda.device_count(),
        federation.client_cpus,
        federation.client_gpus,
    )
    print(f"Simulating with {resources.to_federation_config()}", flush=True)
    with (
        own_superlink(folder / "superlink.log", address) as environment,
        (folder / "flower.log").open("w") as log,
    ):

        def on_line(line: str) -> None:
            print(line, flush=True)
            log.write(f"{line}\n")

        flwr_run(ROOT, environment, {"overrides": shlex.join(overrides)}, resources, on_line)


@hydra.main(config_path=str(ROOT / "conf"), config_name="config", version_base="1.3")
def _hydra_job(config: DictConfig) -> None:
    """Run one job of the command line; a failed one does not stop a sweep."""
    del config  # composed again from the overrides, checked, wherever the apps run
    hydra_config = HydraConfig.get()
    overrides = [o for o in hydra_config.overrides.task if not o.startswith("output_dir=")]
    folder = Path(hydra_config.runtime.output_dir)
    given = [
        o.partition("=")[2] for o in hydra_config.overrides.task if o.startswith("output_dir=")
    ]
    try:
        run_job(overrides, Path(given[0]).absolute() if given else folder)
    except Exception as error:
        # One line: the log above it has the details.
        _failures.append(f"{type(error).__name__}: {error}")
        print(f"error: {_failures[-1]}", file=sys.stderr, flush=True)


def main() -> int:
    """Check every job before the first one starts, run them, and say how it went."""
    return run_script(_run_jobs, "interrupted: everything that was started is stopped")


def _run_jobs() -> int:
    sys.argv[1:] = arguments = resumed(sys.argv[1:])
    if not {"--help", "-h", "--cfg", "-c", "--info", "--hydra-help"} & set(arguments):
        from hafl_app.run.preflight import check

        for job in jobs_of(arguments):
            check(compose(job))
    register_schema()
    _hydra_job()
    return FAILED if _failures else 0


if __name__ == "__main__":
    sys.exit(main())
