"""The command line of a chaos run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hafl_app.config.compose import SettingsError, compose
from hafl_app.experiments.command import Reader, split_arguments
from hafl_app.run import preflight

_DECIDED = {
    "engine",
    "resume",
    "federation.robust",
    "federation.alone_clients_per_rank",
    "federation.test_every",
}


@dataclass(frozen=True)
class ChaosCommand:
    """A checked command line.

    Parameters
    ----------
    overrides
        Hydra overrides that hold for every run.
    seed
        Of the runs, the faults and the kills.
    bad
        Share of faulty replies, in [0, 1].
    kills
        Kills of the server of the faulty run, at least 0.
    flippers
        Share of clients that always flip signs, in [0, 1], in two runs of their own; 0: no such
        runs.
    robust
        Value of ``federation.robust`` in the second of these.
    experiment
        File of ``conf/experiment``.
    output_dir
        Where to write.
    """

    overrides: tuple[str, ...] = ()
    seed: int = 0
    bad: float = 0.1
    kills: int = 3
    flippers: float = 0.2
    robust: str = "median"
    experiment: str = "chaos"
    output_dir: Path | None = None


def parse_command(arguments: Sequence[str]) -> ChaosCommand:
    """Read ``key=value`` arguments; keys that are not the chaos run's own are Hydra overrides.

    Raises
    ------
    SettingsError
        In one line, naming the argument and what was expected.
    """
    own, overrides = split_arguments(arguments, _READERS, "bad=0.1")
    for override in overrides:
        if override.partition("=")[0] in _DECIDED:
            raise SettingsError(f"{override}: a chaos run decides that itself")
    return ChaosCommand(overrides, **own)


def _whole(key: str, text: str) -> int:
    if not text.isdecimal():
        raise SettingsError(f"{key}={text}: expected a whole number, at least 0")
    return int(text)


def _share(key: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise SettingsError(f"{key}={text}: expected a number from 0 to 1")
    return share


_READERS: Mapping[str, Reader] = {
    "seed": _whole,
    "bad": _share,
    "kills": _whole,
    "flippers": _share,
    "robust": lambda _, text: text,
    "experiment": lambda _, text: text,
    "output_dir": lambda _, text: Path(text).expanduser().absolute(),
}


def check_first(command: ChaosCommand) -> None:
    """Refuse a command line as far as its faults show without the model and the data.

    Raises
    ------
    ValueError
        In one line.
    """
    preflight.check_first(compose([f"experiment={command.experiment}", *command.overrides]))
