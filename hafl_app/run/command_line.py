"""Command line of a simulation: Hydra's flags, the jobs it asks for, and the folder of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from hafl_app.config.compose import hydra_settings
from hafl_app.config.files import groups
from hafl_app.config.habits import as_override
from hafl_app.config.overrides import SettingsError, parse_overrides, quoted, sweep_refusal
from hafl_app.config.schema import Settings, declared_settings
from hafl_app.run.going_on import key
from hafl_app.run.run_folder import absolute, check_new, default_folder, output_folder
from hafl_app.run.sweep_plan import SweepPlan, require_plugins, samples

_REFUSED = {
    "config_path": "--config-path",
    "config_name": "--config-name",
    "config_dir": "--config-dir",  # `hafl` takes it before
    "experimental_rerun": "--experimental-rerun",
}
_NO_LIST = "{}: an interval has no list of values; hydra/sweeper=optuna searches in it"
_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")


@dataclass(frozen=True)
class CommandLine:
    """A command line as Hydra reads it.

    Parameters
    ----------
    overrides
        Of settings and of Hydra itself, as typed.
    multirun
        Whether it is a sweep.
    shows
        What it asks to be shown instead of a run: ``"settings"``, which must be right, or
        ``"hydra"``; empty for a run.
    flags
        As typed, with their values.
    """

    overrides: tuple[str, ...]
    multirun: bool
    shows: str
    flags: tuple[str, ...]

    @classmethod
    def of(cls, arguments: Sequence[str]) -> "CommandLine":
        """Read a command line.

        Raises
        ------
        SettingsError
            If a flag is unknown, has no value, or would name another `conf/`.
        """
        parser = get_args_parser()
        parser.error = _refuse  # type: ignore[method-assign]
        if list(arguments) == ["help"]:
            arguments = ["--help"]
        read, unknown = parser.parse_known_intermixed_args(list(arguments))
        if unknown:
            raise SettingsError(_no_flag(unknown[0], list(arguments)))
        for name, flag in _REFUSED.items():
            if getattr(read, name) is not None:
                raise SettingsError(
                    f"{flag}: the settings come from conf/ and from overrides alone; a file of "
                    "your own goes into a folder of conf/, for instance "
                    "conf/experiment/NAME.yaml for experiment=NAME"
                )
        shows = "hydra" if read.hydra_help or read.shell_completion else ""
        if not shows and (read.help or read.cfg or read.info):
            shows = "settings"
        flags = tuple(argument for argument in arguments if argument not in read.overrides)
        return cls(tuple(read.overrides), bool(read.multirun), shows, flags)

    def jobs(self) -> list[list[str]]:
        """Return the overrides of every job, without those of Hydra itself.

        Raises
        ------
        SettingsError
            If an argument is no override, or has several values without ``-m``, or one of Hydra's
            own settings is wrong.
        """
        parsed = parse_overrides(self.overrides)
        if not self.multirun:
            for problem in filter(None, map(sweep_refusal, parsed)):
                raise SettingsError(problem)
        require_plugins(self.overrides)
        if any(map(_is_hydras, self.overrides)):
            self.hydra_settings()
        own = [override for override in parsed if not _is_hydras(override.input_line or "")]
        chosen = [o for o in self.overrides if key(o) == "hydra/sweeper"]
        if chosen and chosen[-1] != "hydra/sweeper=basic":
            return samples(own)
        try:
            batches = BasicSweeper.split_arguments(own, max_batch_size=None)
        except HydraException as error:
            raise SettingsError(_NO_LIST.format(_first_interval(own))) from error
        return [job for batch in batches for job in batch]

    def hydra_settings(self) -> DictConfig:
        """Return Hydra's own settings as this command line has them.

        Raises
        ------
        SettingsError
            If one of them is wrong.
        """
        return hydra_settings([o for o in self.overrides if _is_hydras(o)])

    def varied(self) -> list[str]:
        """Return the names of the settings that have several values."""
        parsed = parse_overrides(self.overrides)
        return [str(o.get_key_element()) for o in parsed if o.is_sweep_override()]

    def sweep(self, placed: Sequence[str], jobs: Sequence[Settings]) -> SweepPlan:
        """Return how the jobs of a sweep will run.

        Parameters
        ----------
        placed
            See `placed`.

        Raises
        ------
        SettingsError
            If they cannot run side by side.
        """
        typed = [o for o in self.overrides if _is_hydras(o)]
        return SweepPlan.of(hydra_settings([*typed, *placed]), typed, self.varied(), jobs)

    def placed(self, jobs: Sequence[Settings]) -> list[str]:
        """Return Hydra's overrides that give every job its folder, all of them new.

        Nothing is written. A sweep's ``output_dir`` has a folder for each job; Hydra's own settings
        of folders hold as they are.

        Raises
        ------
        SettingsError
            If the jobs differ in ``output_dir``.
        hafl_app.run.run_folder.RunFolderError
            If an earlier run would be lost.
        """
        if any(key(override) in _FOLDERS for override in self.overrides):
            return []
        if not self.multirun:
            return [f"hydra.run.dir={quoted(output_folder(jobs[0]))}"]
        given = {settings.output_dir or None for settings in jobs}
        if given == {None}:
            return [f"hydra.sweep.dir={quoted(default_folder('sweep'))}"]
        if len(given) > 1:
            raise SettingsError(
                "output_dir: expected one for the sweep; each job gets a folder in it"
            )
        folder = absolute(str(given.pop()))
        for job in sorted(folder.glob("[0-9]*")):
            check_new(job)
        return [f"hydra.sweep.dir={quoted(folder)}", "hydra.sweep.subdir=${hydra.job.num}"]


def _first_interval(overrides: Sequence[Override]) -> str:
    lines = (str(override.input_line) for override in overrides if override.is_interval_sweep())
    return next(lines, "a sweep")


def _is_hydras(override: str) -> bool:
    return key(override).startswith(("hydra.", "hydra/"))


def _no_flag(flag: str, arguments: Sequence[str]) -> str:
    """Refuse a flag, and say how the setting is given that it may have meant."""
    after = [*arguments, ""][arguments.index(flag) + 1]
    value = "" if after.startswith("-") or "=" in after else after
    known = {"experiment", *groups(), *(found.name for found in declared_settings())}
    if meant := as_override(flag, value, known):
        return f"{flag}: settings are given without hyphens; did you mean {meant}?"
    return f"unrecognized arguments: {flag}; --hydra-help lists the flags"


def _refuse(message: str) -> NoReturn:
    raise SettingsError(f"{message}; --hydra-help lists the flags")
