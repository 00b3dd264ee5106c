"""The command line of a comparison: what to run beside the settings of `conf/`."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hafl_app.config.compose import CONF, SettingsError


@dataclass(frozen=True)
class Command:
    """A checked command line.

    Parameters
    ----------
    experiment
        File of ``conf/experiment`` whose ``compare`` block says what to compare.
    overrides
        Hydra overrides that hold for every run.
    seeds
        One run of every method in every cell for each.
    workers
        Processes that train at once, at least 1.
    tune
        Search the learning rates; otherwise those of the experiment file hold.
    methods, cells
        Names of the chosen ones; empty means all.
    output_dir
        Where to write; the finished runs of an earlier comparison there are kept.
    """

    experiment: str
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    workers: int = 1
    tune: bool = True
    methods: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()
    output_dir: Path | None = None


def parse_command(arguments: Sequence[str], experiment: str | None = None) -> Command:
    """Read ``key=value`` arguments; keys that are not the comparison's own are Hydra overrides.

    Parameters
    ----------
    experiment
        The default; without one it must be given.

    Raises
    ------
    SettingsError
        In one line, naming the argument and what was expected.
    """
    own: dict[str, str] = {}
    overrides = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument.startswith("-") or not equals:
            raise SettingsError(f"{argument}: expected key=value, e.g. seeds=0,1,2")
        if key in {"experiment", *_READERS}:
            own[key] = value
        elif near := [n for n in _READERS if n != key and n.rstrip("s") == key.rstrip("s")]:
            raise SettingsError(f"{argument}: a comparison takes {near[0]}=")
        elif key == "engine":
            raise SettingsError(f"{argument}: the runs of a comparison are in process")
        else:
            overrides.append(argument)
    chosen = own.pop("experiment", experiment)
    if not chosen:
        raise SettingsError(f"experiment= must be given; there are {', '.join(_experiments())}")
    values = {key: _READERS[key](key, value) for key, value in own.items()}
    return Command(chosen, tuple(overrides), **values)  # type: ignore[arg-type]


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


def _experiments() -> list[str]:
    return sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


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
    if not all(text.split(",")):
        raise SettingsError(f"{key}={text}: expected names, e.g. {key}=first,second")
    return tuple(dict.fromkeys(word.strip() for word in text.split(",")))


def _switch(key: str, text: str) -> bool:
    if text not in {"true", "false"}:
        raise SettingsError(f"{key}={text}: expected true or false")
    return text == "true"


_READERS: dict[str, Callable[[str, str], object]] = {
    "seeds": _seeds,
    "workers": _workers,
    "tune": _switch,
    "methods": _names,
    "cells": _names,
    "output_dir": lambda _, text: Path(text).expanduser().absolute(),
}
