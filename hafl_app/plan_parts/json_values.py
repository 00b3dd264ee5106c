"""Parts of a plan as JSON values: written in few characters, and read with every key checked."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from textwrap import shorten
from typing import Any

from hafl_app.plan_parts.component_lists import (
    format_bits,
    format_indices,
    parse_bits,
    parse_indices,
)
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.plan_parts.trained_core import Core

_RARE: Mapping[str, Any] = {"budget": None, "gain": 1.0, "own_lora_B": False, "core": None}
"""What few modules' plans have, by name, with what it is for all others."""


def with_keys_of(kind: type[Any], values: Any) -> dict[str, Any]:
    """Return ``values`` if it names exactly the fields of a dataclass: none has a default here.

    Raises
    ------
    ValueError, TypeError
        If a key is missing or unknown, or there are none.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} is {type(values).__name__}, expected an object")
    if odd := sorted({field.name for field in fields(kind)} ^ set(values)):
        raise ValueError(f"{kind.__name__}: keys missing or unknown: {odd}")
    return values


def read_part(kind: type[Any], values: Any) -> Any:
    """Return a part of a plan, a dataclass of its values; None if there is none."""
    return None if values is None else kind(**with_keys_of(kind, values))


def module_entries(modules: Mapping[str, ModulePlan]) -> list[list[Any]]:
    """Write modules by name; those with equal plans share one entry."""
    groups: dict[ModulePlan, list[str]] = {}
    for name, module in modules.items():
        groups.setdefault(module, []).append(name)
    return [_module_entry(module, names) for module, names in groups.items()]


def _module_entry(module: ModulePlan, names: list[str]) -> list[Any]:
    """Write modules of one plan: three values, the names, and what few plans have."""
    entry: list[Any] = [format_indices(module.held), format_indices(module.trainable)]
    entry += [module.scaling, names]
    if module.bits:
        entry.append(format_bits(module.bits))
    if module.factors != "both":
        entry.append(module.factors)
    if rare := {name: v for name, v in _rare(module).items() if v != _RARE[name]}:
        entry.append(rare)
    return entry


def _rare(module: ModulePlan) -> dict[str, Any]:
    values = {name: getattr(module, name) for name in _RARE}
    return values if module.core is None else values | {"core": asdict(module.core)}


def read_modules(entries: Any) -> dict[str, ModulePlan]:
    """Read what `module_entries` has written.

    Raises
    ------
    ValueError, TypeError
        If it is not of that form.
    """
    modules: dict[str, ModulePlan] = {}
    for held, trainable, scaling, names, *rest in entries:
        plan = ModulePlan(
            parse_indices(held), parse_indices(trainable), scaling, **_read_rest(rest)
        )
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"module names {names!r}, expected a list of text")
        for name in names:
            if name in modules:
                raise ValueError(f"module {name!r} occurs twice")
            modules[name] = plan
    return modules


def _read_rest(rest: list[Any]) -> dict[str, Any]:
    """Read what is optional behind a module's names: bits, not empty, then a factor, then more."""
    values: dict[str, Any] = {}
    if rest and isinstance(rest[-1], dict):
        *rest, more = rest
        if not more or more.keys() - _RARE.keys():
            expected = ", ".join(_RARE)
            raise TypeError(
                f"behind module names {shorten(repr(more), 80)}, expected some of {expected}"
            )
        values |= more
        if "core" in more:
            values["core"] = read_part(Core, more["core"])
    if rest and rest[-1] in ("A", "B"):
        *rest, values["factors"] = rest
    if rest:
        if len(rest) > 1 or not isinstance(rest[0], str) or not rest[0]:
            raise TypeError(
                f"behind module names {shorten(repr(rest), 80)}, expected bits, then A or B, or "
                "nothing"
            )
        values["bits"] = parse_bits(rest[0])
    return values
