"""Compose `conf/` with overrides into checked settings, or say in one line what is wrong."""

import dataclasses
import functools
import math
import operator
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from hafl_app.config.files import CONF, groups, own_folder
from hafl_app.config.habits import MODEL
from hafl_app.config.hints import nearest, setting_hint
from hafl_app.config.overrides import SettingsError, parse_overrides, quoted, sweep_refusal
from hafl_app.config.schema import Settings
from hafl_app.config.untrusted import bad_overrides, bad_values, method_class
from hafl_app.fields import LIMIT_WORDS
from hafl_app.renames import refusal

__all__ = ["SettingsError", "compose", "quoted"]

_NO_LIST = "is not a ListConfig, list or tuple"
_HOLDS: dict[str, Callable[[Any, Any], bool]] = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


@functools.cache
def register_schema() -> None:
    """Make the schema known to Hydra, once; `conf/config.yaml` names it first in its defaults."""
    schema = OmegaConf.structured(Settings)
    _make_writable(schema)
    ConfigStore.instance().store(name="schema", node=schema)


def _make_writable(node: DictConfig) -> None:
    """Remove the read-only flag of frozen groups, so that files can be merged into them."""
    node._set_flag("readonly", None)
    for key in node:
        if isinstance(child := node._get_node(key), DictConfig):
            _make_writable(child)


def compose(overrides: Sequence[str]) -> Settings:
    """Compose and check the settings for a list of Hydra overrides.

    Nodes compose for every message, so what was composed before is kept. Each call gets a copy of
    its own, which it may change.

    Raises
    ------
    SettingsError
        In one line: the value, what was expected, and the nearest right name.
    """
    own: Settings = _own_copy(_compose(tuple(overrides), own_folder()))
    return own


def _own_copy(value: Any) -> Any:
    """Copy dataclasses from their fields alone, and the lists and dictionaries in them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        declared = [f.name for f in dataclasses.fields(value) if f.init]
        return type(value)(**{name: _own_copy(getattr(value, name)) for name in declared})
    if isinstance(value, list):
        return [_own_copy(item) for item in value]
    if isinstance(value, dict):
        return {key: _own_copy(item) for key, item in value.items()}
    return value


@functools.lru_cache(maxsize=256)  # a comparison asks for each of its runs several times
def _compose(overrides: tuple[str, ...], own: Path | None) -> Settings:
    del own  # a key of what is kept
    try:
        parsed = _checked(overrides)
        settings = to_settings(merge_files(overrides))
    except SettingsError:
        raise
    except RecursionError as error:
        raise SettingsError("the overrides are nested too deep") from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise SettingsError(_explain(error, overrides)) from error
    except (AssertionError, AttributeError) as error:
        if problem := _unmergeable(overrides):
            raise SettingsError(problem) from error
        raise
    # Hydra forgets a removed setting without a word where the schema has a default for it.
    for problem in (_removes(override) for override in parsed if override.is_delete()):
        raise SettingsError(problem)
    return settings


def _checked(overrides: Sequence[str]) -> list[Override]:
    parsed = parse_overrides(overrides)
    for problem in filter(None, map(sweep_refusal, parsed)):
        raise SettingsError(problem)
    files = groups()
    for problem, name, known in bad_overrides(parsed, files):
        raise SettingsError(problem + nearest(name, known))
    for override in parsed:
        if override.is_delete() and override.key_or_group in files:
            raise SettingsError(_removes(override))
    if problem := _label_alone(parsed):
        raise SettingsError(problem)
    return parsed


def _label_alone(overrides: Sequence[Override]) -> str:
    """Refuse a name for the base model without the model: it is a label, and selects nothing."""
    given = {override.key_or_group.lstrip("+"): override for override in overrides}
    if "model.name" not in given or "model.path" in given:
        return ""
    line = given["model.name"].input_line
    hint = MODEL.format(given["model.name"].value())
    return f"{line}: only the label in tables and files; {hint} selects a base model"


def hydra_settings(overrides: Sequence[str]) -> DictConfig:
    """Compose Hydra's own settings, of which the command line of a simulation may set some.

    Raises
    ------
    SettingsError
        In one line, naming the first override that is wrong.
    """
    # Files before settings: a launcher's settings exist once it is chosen.
    ordered = sorted(overrides, key=lambda override: "/" not in override.partition("=")[0])
    composed = merge_files([], with_hydra=True)
    for number, override in enumerate(ordered, start=1):
        try:
            composed = merge_files(ordered[:number], with_hydra=True)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise SettingsError(f"{override}: {_first_line(error)}") from error
    found: DictConfig = composed.hydra
    return found


def merge_files(overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    """Let Hydra merge the files of `conf/`, unchecked, also with its own settings.

    Also inside a Hydra job, whose own state comes back after.
    """
    if with_hydra:
        return _merge(overrides, with_hydra=True)
    files, values = _files_and_values(overrides)
    if values is None:
        return _merge(overrides)
    merged: DictConfig = pickle.loads(_merged(tuple(files)))  # noqa: S301  own bytes
    ConfigLoaderImpl._apply_overrides_to_config(values, merged)
    return merged


def _files_and_values(overrides: Sequence[str]) -> tuple[list[str], list[Override] | None]:
    """Part the choices of files from the values of single settings.

    No values if there is more than these two: what is added or removed, Hydra's own settings, or a
    user's own files, which may change meanwhile.
    """
    known, files, values = groups(), [], []
    for override in parse_overrides(overrides):
        name = override.key_or_group
        plain = override.type is OverrideType.CHANGE and override.package is None
        plain = plain and not override.is_sweep_override() and "/" not in name
        if own_folder() or not plain or name.partition(".")[0] == "hydra":
            return [], None
        if name in known:
            files.append(str(override.input_line))
        else:
            values.append(override)
    return files, values


@functools.lru_cache(maxsize=1024)
def _merged(files: tuple[str, ...]) -> bytes:
    """Merge these files, kept: it takes most of the time that composing takes.

    Pickled, they take a seventh of the memory, 20 KB, and are copied four times as fast.
    """
    return pickle.dumps(_merge(files))


def _merge(overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    register_schema()
    if own := own_folder():
        overrides = [*overrides, f"hydra.searchpath=[{quoted(own.as_uri())}]"]
    singleton: Any = GlobalHydra.instance()
    running, singleton.hydra = singleton.hydra, None
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra_compose("config", list(overrides), return_hydra_config=with_hydra)
    finally:
        singleton.hydra = running


def to_settings(composed: DictConfig) -> Settings:
    """Turn a composed config into settings, with every type and range checked.

    Raises
    ------
    SettingsError
        See `compose`.
    """
    for problem in (*bad_values(composed), *_unknown(composed, "")):
        raise SettingsError(problem)
    others = composed.copy()
    others.strategy = None
    settings: Settings = _in_range(others)
    # Last, and once all else is right: a method's class is imported, and with it torch.
    settings.strategy = _in_range(_typed_strategy(composed.strategy), "strategy.")
    return settings


def _in_range(composed: DictConfig, prefix: str = "") -> Any:
    """Return the dataclass that a config is, with every range checked."""
    for name in sorted(OmegaConf.missing_keys(composed)):
        raise SettingsError(f"{prefix}{name} must be given, e.g. {prefix}{name}=...")
    settings = OmegaConf.to_object(composed)
    for problem in _out_of_range(settings, prefix):
        raise SettingsError(problem)
    return settings


def _unknown(node: Container, prefix: str) -> Iterator[str]:
    """Find settings that the schema does not have: an override with + adds anything."""
    if isinstance(node, ListConfig):
        for position in range(len(node)):
            if isinstance(child := node._get_node(position), Container):
                yield from _unknown(child, f"{prefix}{position}.")
        return
    declared = OmegaConf.get_type(node)
    if not dataclasses.is_dataclass(declared):
        return
    known = [f.name for f in dataclasses.fields(declared)]
    for key in map(str, node):
        name, child = f"{prefix}{key}", node._get_node(key)
        if key not in known:
            hint = setting_hint(name, [f"{prefix}{other}" for other in known])
            yield refusal(name) or f"{name}: no such setting{hint}"
        elif isinstance(child, Container) and not child._is_none() and not child._is_missing():
            yield from _unknown(child, f"{name}.")


def strategy_arguments(settings: Settings) -> dict[str, Any]:
    """Return the strategy's hyper-parameters by name, without its ``_target_``."""
    strategy = settings.strategy
    return {f.name: getattr(strategy, f.name) for f in dataclasses.fields(strategy) if f.init}


def _typed_strategy(strategy: DictConfig) -> DictConfig:
    """Check the strategy's settings against the fields of the class it names."""
    values: Any = OmegaConf.to_container(strategy, resolve=True)
    try:
        method = method_class(values.pop("_target_", None))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    try:
        typed: Any = OmegaConf.merge(OmegaConf.structured(method), values)
    except OmegaConfBaseException as error:
        name = f"strategy.{error.full_key}"
        hint = setting_hint(name, []) if isinstance(error, ConfigKeyError) else ""
        raise SettingsError(refusal(name) or f"{name}: {_first_line(error)}{hint}") from error
    merged: DictConfig = typed
    return merged


def _out_of_range(settings: Any, prefix: str) -> Iterator[str]:
    for setting in dataclasses.fields(settings):
        name, value = f"{prefix}{setting.name}", getattr(settings, setting.name, None)
        for place, group in _groups_in(value):
            yield from _out_of_range(group, f"{name}{place}.")
        if value is None:
            continue
        choices = setting.metadata.get("choices")
        if choices and value not in choices:
            yield f"{name}={value}: expected {_or_list(choices)}{nearest(str(value), choices)}"
        each = value if isinstance(value, list) else [value]
        for kind, limit in setting.metadata.get("limits", {}).items():
            if not all(_HOLDS[kind](one, limit) for one in each):
                yield f"{name}={value}: must be {LIMIT_WORDS[kind]} {limit}"
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name}={value}: must be a finite number"


def _groups_in(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the groups of settings in a value, and their places: itself, or its items."""
    if isinstance(value, list | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        yield from ((f".{key}", item) for key, item in items if dataclasses.is_dataclass(item))
    elif dataclasses.is_dataclass(value):
        yield "", value


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """Name the wrong override in one line; Hydra takes several, and gives no near names."""
    files = groups()
    known = _known_keys(tuple(o for o in overrides if o.partition("=")[0] in files))
    for override in parse_overrides(overrides):
        if known and (problem := _misnamed(override, [*files, *known])):
            return problem
    name = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
    if old := refusal(name or ""):
        return old
    text = _first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
    if _NO_LIST in text:
        text = "expected a list, as in [first,second]"
    return f"{name}: {text}" if name and name not in text else text


def _unmergeable(overrides: Sequence[str]) -> str:
    """Say which override sets keys below a setting that is null, on which OmegaConf crashes."""
    for override in parse_overrides(overrides):
        if override.is_add() or isinstance(override.value(), dict):
            return (
                f"{override.input_line}: keys cannot be added to a setting that is null; write "
                "them into a file of conf/"
            )
    return ""


def _misnamed(override: Override, known: Sequence[str]) -> str:
    """Say what is wrong with an override's name or with the sign before it; empty if nothing is."""
    name, line = override.key_or_group, override.input_line
    if old := refusal(name):
        return old
    if name not in known:
        return f"{line}: no such setting{setting_hint(name, known)}"
    if override.is_delete():
        return _removes(override)
    if override.is_add() and not override.is_force_add():
        return f"{line}: {name} exists already; leave out the +"
    if override.package is not None:
        return f"{line}: a group has one place; leave out the @{override.package}"
    return ""


def _removes(override: Override) -> str:
    name = override.key_or_group
    return f"{override.input_line}: a setting cannot be removed; {name}=... gives it another value"


def _known_keys(group_overrides: tuple[str, ...]) -> list[str]:
    """List every setting that exists under these group choices, leaves and branches."""
    try:
        composed = merge_files(group_overrides)
    except (HydraException, OmegaConfBaseException, ValueError):
        return []

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for key in node:
            name = f"{prefix}{key}"
            yield name
            if not OmegaConf.is_missing(node, key) and OmegaConf.is_dict(
                child := node._get_node(key)
            ):
                yield from walk(child, f"{name}.")

    return list(walk(composed, ""))


def _or_list(words: Sequence[str]) -> str:
    return " or ".join(words) if len(words) < 3 else f"one of {', '.join(words)}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
