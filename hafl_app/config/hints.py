"""What was probably meant by a name that does not exist."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, Final

import yaml

from hafl_app.config.files import files_of
from hafl_app.config.habits import habit

_ALIKE: Final = 0.75  # similarity of two names without their groups


def nearest(name: str, names: Sequence[str]) -> str:
    """Return the hint at the most similar name, to be appended to a message; empty without one."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def setting_hint(name: str, known: Sequence[str]) -> str:
    """Return the hint at the setting that ``name`` may have meant, see `nearest`.

    In this order: a setting of another strategy, what people bring along from elsewhere, a setting
    of another group that is called so, a similar one.
    """
    group, _, bare = name.rpartition(".")
    if group == "strategy" and (having := _strategies_with(bare)):
        return _of_others(bare, having)
    if meant := habit(name):
        beside = f"{group}.{meant.rpartition('.')[2]}"
        return f"; did you mean {beside if beside in known else meant}?"
    if same := [other for other in known if other.rpartition(".")[2] == bare]:
        return f"; did you mean {same[0]}?"
    if not group:
        if having := _strategies_with(bare):
            return _of_others(bare, having)
        ends = {other.rpartition(".")[2]: other for other in reversed(known)}
        if near := difflib.get_close_matches(bare, ends, n=1, cutoff=_ALIKE):
            return f"; did you mean {ends[near[0]]}?"
    return nearest(name, known)


def _of_others(setting: str, strategies: Sequence[str]) -> str:
    return f"; strategy.{setting} belongs to strategy={' or '.join(strategies)}, not to this one"


def _strategies_with(setting: str) -> list[str]:
    return [file.stem for file in files_of("strategy") if setting in dict(_own(file.stem))]


def _own(strategy: str) -> Iterator[tuple[str, Any]]:
    """Yield the settings that a strategy does not take from another group."""
    for key, value in _values(strategy):
        if key != "_target_" and not str(value).startswith("${"):
            yield key, value


def _values(strategy: str) -> Iterator[tuple[str, Any]]:
    """Yield what a file of `conf/strategy` sets, and what the file that it is based on does."""
    file = next(f for f in files_of("strategy") if f.stem == strategy)
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    for base in content.pop("defaults", ()):
        if isinstance(base, str) and base != "_self_":
            yield from _values(base.partition("@")[0].rpartition("/")[2])
    yield from content.get("strategy", content).items()
