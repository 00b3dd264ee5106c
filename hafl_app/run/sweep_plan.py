"""A sweep before it starts: its plugins, its folder, how many jobs it has and how they run."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from itertools import cycle, islice
from pathlib import Path
from typing import Final

from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig, OmegaConf

from hafl_app.cgroups import usable_cpus
from hafl_app.config.overrides import SettingsError, quoted
from hafl_app.config.schema import Settings
from hafl_app.metrics import TASKS
from hafl_app.packages import install_command
from hafl_app.run.going_on import key
from hafl_app.run.run_folder import absolute

_PLUGINS: Final = {
    "hydra/launcher=joblib": "hydra-joblib-launcher",
    "hydra/launcher=ray": "hydra-ray-launcher",
    "hydra/sweeper=optuna": "hydra-optuna-sweeper",
}
# It asks for a cloudpickle below 3, which joblib refuses; it works with that which is there.
_OWN_WAY: Final = {"hydra-ray-launcher": "pip install --no-deps hydra-ray-launcher"}
_DIRECTION, _FAILURES = "hydra.sweeper.direction", "hydra.sweeper.max_failure_rate"


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that is about to start.

    Parameters
    ----------
    folder
        Absolute; the folders of the jobs are in it.
    num_jobs
        How many there are; of a sweeper that chooses them as it goes, at most.
    at_once
        Whether jobs run in processes of their own, perhaps several at the same time.
    varied
        Settings that have several values.
    searches
        Whether the sweeper chooses the jobs as it goes.
    overrides
        Of Hydra itself, beside those that were typed.
    warnings
        About how the jobs would run.
    """

    folder: Path
    num_jobs: int
    at_once: bool
    varied: tuple[str, ...]
    searches: bool
    overrides: tuple[str, ...]
    warnings: tuple[str, ...]

    @classmethod
    def of(
        cls,
        hydra: DictConfig,
        typed: Sequence[str],
        varied: Sequence[str],
        jobs: Sequence[Settings],
    ) -> "SweepPlan":
        """Plan a sweep.

        Parameters
        ----------
        hydra
            Its own settings, composed.
        typed
            Overrides as typed.
        varied
            As in the class.
        jobs
            Settings of the jobs; of a sweeper that chooses them, samples.

        Raises
        ------
        SettingsError
            If the jobs cannot run side by side.
        """
        at_once = not _is_basic(hydra, "launcher")
        if at_once and any(settings.engine == "ray" for settings in jobs):
            raise SettingsError(
                "engine=ray: its jobs cannot run side by side, since each takes all CPUs for a Ray "
                "of its own; with hydra/launcher= add engine=inprocess"
            )
        folder = absolute(str(hydra.sweep.dir))
        more = [f"hydra.sweep.dir={quoted(folder)}"]
        given = set(map(key, typed))
        if OmegaConf.select(hydra, "sweeper.direction") is not None and _DIRECTION not in given:
            best = TASKS[jobs[0].model.task].primary
            more.append(f"{_DIRECTION}={'maximize' if best.higher_is_better else 'minimize'}")
        if "max_failure_rate" in hydra.sweeper and _FAILURES not in given:
            more.append(f"{_FAILURES}=1.0")  # a failed job ends no sweep
        trials = OmegaConf.select(hydra, "sweeper.n_trials", default=len(jobs))
        searches = not _is_basic(hydra, "sweeper")
        crowded = _crowded(OmegaConf.select(hydra, "launcher.n_jobs"), int(trials), jobs)
        warnings = [crowded] if at_once and crowded else []
        return cls(
            folder, int(trials), at_once, tuple(varied), searches, tuple(more), tuple(warnings)
        )


def _crowded(workers: int | None, num_jobs: int, jobs: Sequence[Settings]) -> str:
    """Return a warning if jobs side by side have more threads than there are CPUs.

    Parameters
    ----------
    workers
        Processes as joblib counts them: -1 is one for each CPU; None: not known.
    """
    if workers is None:
        return ""
    cpus = usable_cpus()
    workers = min(num_jobs, workers if workers > 0 else max(1, cpus + 1 + workers))
    threads = max(
        count for s in jobs for count in (s.client.num_threads, s.federation.server_threads or 0)
    )
    if workers == 1 or workers * threads <= cpus:
        return ""
    return (
        f"{workers} jobs at once with {threads} threads each on {cpus} usable CPUs wait for each "
        f"other; expected hydra.launcher.n_jobs={max(1, cpus // threads)}"
    )


def require_plugins(overrides: Sequence[str]) -> None:
    """Refuse a launcher or a sweeper whose package is not installed.

    Raises
    ------
    SettingsError
        In one line, with the command that installs it.
    """
    for override in overrides:
        if package := _PLUGINS.get(override):
            try:
                distribution(package)
            except PackageNotFoundError as error:
                command = _OWN_WAY.get(package) or install_command(package)
                raise SettingsError(f"{override} needs the package {package}: {command}") from error


def samples(overrides: Sequence[Override]) -> list[list[str]]:
    """Return jobs in which every value that is listed, and both ends of an interval, occur.

    Of a sweeper that chooses values as it goes, to be checked before it starts.
    """
    values = [_values(override) for override in overrides]
    most = max(map(len, values), default=1)
    return [list(job) for job in zip(*(islice(cycle(v), most) for v in values), strict=True)]


def _values(override: Override) -> list[str]:
    name, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        return [f"{name}={value.start}", f"{name}={value.end}"]
    if override.is_sweep_override():
        return [f"{name}={text}" for text in override.sweep_string_iterator()]
    return [f"{name}={override.get_value_element_as_str()}"]


def _is_basic(hydra: DictConfig, part: str) -> bool:
    target = str(OmegaConf.select(hydra, f"{part}._target_"))
    return target.startswith("hydra._internal.core_plugins.basic_")
