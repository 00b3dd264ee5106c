"""Check overrides that come from a server, which a node need not trust.

Every node composes its settings from the overrides in the run config, before it has looked at
any of them. Composing must therefore neither run code, nor read files outside `conf/`, nor look
into the environment.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from hafl_app.config.habits import choice_habit
from hafl_app.renames import choice_refusal, renamed_target

STRATEGY_PACKAGES = "HAFL_STRATEGY_PACKAGES"
"""Environment variable: further packages, separated by commas, whose methods may be named."""

_OWN_PACKAGE = "hafl_app.strategies"
_METHOD = f"{_OWN_PACKAGE}.base.HeterogeneousLora"
_REFERENCE = re.compile(r"\$\{[\w.\[\]\s]*\}")  # ${lora.max_rank}, but not ${oc.env:HOME}
_SEVERAL = ("tracking",)  # groups of which several files may be chosen
_PATHS = ("dataset.path", "dataset.test_path", "model.path")


def bad_overrides(
    overrides: Sequence[Override], groups: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Find overrides that reach beyond the files of `conf/`.

    Hydra itself would follow ``dataset=../../elsewhere`` and ``hydra.searchpath``.

    Parameters
    ----------
    groups
        The choices of every config group.

    Yields
    ------
    tuple
        The fault in one line, the given name, and the known names.
    """
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if re.split(r"[./]", key)[0] == "hydra":
            yield f"{override.input_line}: Hydra's own settings are not part of a run", "", ()
        if key in groups and not override.is_delete():
            chosen = value if isinstance(value, list) and key in _SEVERAL else [value]
            for choice in map(str, chosen):
                if choice not in groups[key]:
                    yield _no_such_file(key, choice, groups[key])


def _no_such_file(group: str, choice: str, known: Sequence[str]) -> tuple[str, str, Sequence[str]]:
    """Return the fault of a choice that a group does not have, as `bad_overrides` yields it."""
    if old := choice_refusal(group, choice):
        return old, "", ()
    if meant := choice_habit(group, choice):
        return f"{group}={choice}: no such {group}; did you mean {meant}?", "", ()
    return f"{group}={choice}: no such {group}; there are {', '.join(known)}", choice, known


def bad_values(composed: DictConfig) -> Iterator[str]:
    """Find values that would look into the environment, and paths that are addresses.

    Yields
    ------
    str
        The fault in one line.
    """
    for name, value in _leaves(OmegaConf.to_container(composed, resolve=False), ""):
        if "${" in _REFERENCE.sub("", value):
            yield f"{name}={value}: only other settings can be named, such as ${{lora.max_rank}}"
        if name in _PATHS and "://" in value:
            # Not shown: addresses may carry a password.
            yield f"{name}: expected a local file or folder, got an address with ://"


def _leaves(node: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, name)
    elif isinstance(node, str):
        yield name, node


def method_class(target: Any) -> type:
    """Return the aggregation method that ``strategy._target_`` names.

    Only methods of this project, and of the packages that `STRATEGY_PACKAGES` lists, are
    imported: importing runs code.

    Raises
    ------
    ValueError
        In one line, if it names anything else.
    """
    if (new := renamed_target(str(target))) != str(target):
        raise ValueError(f"strategy._target_: {target} is now {new}")
    module, _, name = str(target).rpartition(".")
    listed = os.environ.get(STRATEGY_PACKAGES, "").split(",")
    packages = [_OWN_PACKAGE, *(package.strip() for package in listed if package.strip())]
    if not any(f"{module}.".startswith(f"{package}.") for package in packages):
        raise ValueError(
            f"strategy._target_={target}: expected a class of {' or '.join(packages)}; "
            f"{STRATEGY_PACKAGES} in a node's environment allows another package"
        )
    try:
        found = getattr(import_module(module), name, None)
    except ImportError as error:
        # Other messages of Python's name the file: on a node they would go to the server.
        reason = str(error) if isinstance(error, ModuleNotFoundError) else type(error).__name__
        raise ValueError(f"strategy._target_={target}: cannot be imported ({reason})") from error
    if not isinstance(found, type) or not _is_method(found):
        raise ValueError(f"strategy._target_={target}: expected a dataclass made from {_METHOD}")
    return found


def _is_method(found: type) -> bool:
    # By name: the settings know no strategies.
    ancestors = {f"{base.__module__}.{base.__qualname__}" for base in found.__mro__}
    return dataclasses.is_dataclass(found) and _METHOD in ancestors
