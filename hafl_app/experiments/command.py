"""Command lines of the experiments: what to run beside the settings of `conf/`."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hafl_app.config.compose import SettingsError
from hafl_app.config.files import groups
from hafl_app.experiments.named_methods import named_methods
from hafl_app.run.run_folder import default_folder

Reader = Callable[[str, str], object]


@dataclass(frozen=True)
class Command:
    """The checked command line of a comparison.

    Parameters
    ----------
    experiment
        File of ``conf/experiment``, whose ``compare`` block has the methods; empty: none.
    overrides
        Hydra overrides that hold for every run.
    seeds
        One run of every method in every cell for each.
    workers
        Processes that train at once, at least 1.
    tune
        Search the learning rates; otherwise those of the experiment file hold.
    methods, cells
        Names of the chosen ones; empty means all. Without a ``compare`` block the methods are
        strategies, see `hafl_app.experiments.named_methods`.
    output_dir
        Where to write; the finished runs of an earlier comparison there are kept.
    older
        Whether runs of an earlier version are kept that lack a setting which has its default now.
    """

    experiment: str = ""
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    workers: int = 1
    tune: bool = True
    methods: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()
    output_dir: Path | None = None
    older: bool = False

    @property
    def common(self) -> tuple[str, ...]:
        """The overrides that hold for every run, the experiment first."""
        experiment = (f"experiment={self.experiment}",) if self.experiment else ()
        return (*experiment, *self.overrides)

    @property
    def folder_name(self) -> str:
        """What a new folder is called, after the time."""
        return f"compare-{self.experiment}" if self.experiment else "compare"


def parse_command(arguments: Sequence[str], experiment: str | None = None) -> Command:
    """Read ``key=value`` arguments; keys that are not the comparison's own are Hydra overrides.

    Parameters
    ----------
    experiment
        The default; without one it must be given, or the methods.

    Raises
    ------
    SettingsError
        In one line, naming the argument and what was expected.
    """
    own, overrides = split_arguments(arguments, _READERS, "seeds=0,1,2")
    for override in overrides:
        key = override.partition("=")[0]
        if near := [name for name in _READERS if name.rstrip("s") == key.rstrip("s")]:
            raise SettingsError(f"{override}: a comparison takes {near[0]}=")
        if key == "engine":
            raise SettingsError(f"{override}: the runs of a comparison are in process")
        if key == "resume":
            raise SettingsError(
                f"{override}: resumes one run; a comparison goes on where it stopped with "
                "output_dir= and its folder"
            )
    chosen = own.pop("experiment", experiment) or ""
    if not chosen and "methods" not in own:
        there_are = ", ".join(groups()["experiment"])
        raise SettingsError(
            f"experiment= or methods= must be given, as in methods=hafl,flexlora; the experiments "
            f"are {there_are}"
        )
    if not chosen:
        named_methods(own["methods"])  # before anything heavy is imported for the settings
    return Command(chosen, overrides, **own)


def output_folder(given: Path | None, name: str) -> Path:
    """Return the given folder, else a new one named by time, absolute."""
    return default_folder(name) if given is None else given.absolute()


def split_arguments(
    arguments: Sequence[str], readers: Mapping[str, Reader], example: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Split a command line of ``key=value`` into a program's own values and Hydra overrides.

    Parameters
    ----------
    readers
        By the program's own keys: called with key and text, returns the value.
    example
        An argument as it should be.

    Raises
    ------
    SettingsError
        If an argument has another form, or from a reader.
    """
    own: dict[str, Any] = {}
    overrides = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if argument.startswith("-") or not equals:
            raise SettingsError(f"{argument}: expected key=value, e.g. {example}")
        if key in readers:
            if not text:
                raise SettingsError(f"{key}=: expected a value, or leave it out")
            if key in own:
                raise SettingsError(f"{argument}: {key}= is given twice, expected once")
            own[key] = readers[key](key, text)
        else:
            overrides.append(argument)
    return own, tuple(overrides)


def choose(kind: str, wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the wanted names, all known ones if none is named.

    Raises
    ------
    SettingsError
        If one does not exist; the message has the nearest that does.
    """
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise SettingsError(f"{kind}={name}: there are {', '.join(known) or 'none'}{hint}")
    return list(wanted or known)


def _whole(key: str, text: str) -> int:
    if not text.isdecimal():
        raise SettingsError(f"{key}={text}: expected a whole number")
    return int(text)


def _workers(key: str, text: str) -> int:
    if _whole(key, text) < 1:
        raise SettingsError(f"{key}={text}: expected at least 1")
    return int(text)


def _seeds(key: str, text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise SettingsError(f"{key}={text}: expected whole numbers, e.g. {key}=0,1,2")
    seeds = tuple(int(word) for word in words)
    if len(set(seeds)) < len(seeds):
        raise SettingsError(f"{key}={text}: a seed comes twice")
    return seeds


def _names(key: str, text: str) -> tuple[str, ...]:
    names = tuple(word.strip() for word in text.split(","))
    if not all(names):
        raise SettingsError(f"{key}={text}: expected names, e.g. {key}=first,second")
    if twice := [name for name in names if names.count(name) > 1]:
        raise SettingsError(f"{key}={text}: {twice[0]} comes twice")
    return names


def _switch(key: str, text: str) -> bool:
    if text not in {"true", "false"}:
        raise SettingsError(f"{key}={text}: expected true or false")
    return text == "true"


_READERS: Mapping[str, Reader] = {
    "experiment": lambda _, text: text,
    "seeds": _seeds,
    "workers": _workers,
    "tune": _switch,
    "methods": _names,
    "cells": _names,
    "older": _switch,
    "output_dir": lambda _, text: Path(text).expanduser().absolute(),
}
