"""Old names of settings, classes and facts in files, and what they are called now.

A setting by its old name is refused with the new one. What an earlier version wrote, a run's
``config.yaml``, its checkpoints and saved adapters, is read as if it had the new names. Standard
library only.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

SETTINGS: Final = {
    "model.quantisation": "model.quantization",
    "strategy.regulariser": "strategy.regularizer",
}
"""Settings by their full name."""

GROUPS: Final = {"tracking.kind": "tracking"}
"""Settings whose values are files of a group, which switch on settings of these names."""

CHOICES: Final[Mapping[str, Mapping[str, str]]] = {
    "model": {
        "llama_1b": "llama_1b_random",
        "llama_7b": "llama_7b_random",
        "vit_digits": "vit_digits_random",
    },
}
"""Files of a config group, by the group; ``model.name`` is called as the file."""

_NO_TRACKER: Final = ("jsonl", "none")

MODULES: Final[Mapping[str, str]] = {
    "hafl_app.strategies.averaging": "hafl_app.strategies.component_mean",
}
"""Modules that ``strategy._target_`` may name."""

FACTS: Final[Mapping[str, str]] = {
    **{old.rpartition(".")[2]: new.rpartition(".")[2] for old, new in SETTINGS.items()},
    "centralised": "centralized",
}
"""Keys in the file of a saved adapter."""


def refusal(name: str) -> str:
    """Return the line that refuses an old name of a setting; empty if it is none."""
    new = SETTINGS.get(name) or GROUPS.get(name)
    return f"{name} is now {new}" if new else ""


def choice_refusal(group: str, choice: str) -> str:
    """Return the line that refuses an old name of a group's file; empty if it is none."""
    new = renamed_choice(group, choice)
    return f"{group}={choice} is now {group}={new}" if new != choice else ""


def renamed_choice(group: str, choice: str) -> str:
    """Return today's name of a group's file."""
    return CHOICES.get(group, {}).get(choice, choice)


def renamed_target(target: str) -> str:
    """Return a ``_target_`` with today's module."""
    module, dot, name = target.rpartition(".")
    return f"{MODULES.get(module, module)}{dot}{name}"


def renamed_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings that a run saved under today's names."""
    renamed: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        new = SETTINGS.get(name, name).rpartition(".")[2]
        if name in GROUPS:
            if value not in _NO_TRACKER:
                renamed[value] = True
        elif isinstance(value, Mapping):
            renamed[new] = renamed_settings(value, f"{name}.")
        else:
            renamed[new] = _renamed_value(name, value)
    return renamed


def _renamed_value(name: str, value: Any) -> Any:
    group, _, key = name.rpartition(".")
    if key == "_target_":
        return renamed_target(value)
    return renamed_choice(group, value) if key == "name" and isinstance(value, str) else value


def renamed_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that a run saved under today's names."""
    return [_renamed_override(override) for override in overrides]


def _renamed_override(override: str) -> str:
    key, equals, value = override.partition("=")
    bare = key.lstrip("+~")
    value = renamed_target(value) if bare == "strategy._target_" else renamed_choice(bare, value)
    return f"{key[: len(key) - len(bare)]}{(SETTINGS | GROUPS).get(bare, bare)}{equals}{value}"
