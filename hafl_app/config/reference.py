"""`docs/settings.md`: every setting with its type, range, default and description.

Types, ranges and defaults are those of the fields, descriptions those of the docstrings of their
classes, and a file of `conf/` is described by the comment at its top: nothing is written twice.
"""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeGuard

from omegaconf import OmegaConf

from hafl_app.config.compose import merge_files
from hafl_app.config.files import files_of
from hafl_app.config.schema import Settings
from hafl_app.config.untrusted import method_class
from hafl_app.fields import LIMIT_WORDS, REQUIRED, default_of, is_resumable

_RESUMABLE: Final = "↻"
_INTRODUCTION: Final = f"""\
# Settings

<!-- Written by scripts/settings_doc.py from the schema and the files of conf/. Do not edit. -->

A setting is given as `group.name=value` (`batch_size` under *client* is `client.batch_size`), a
file of a group as `group=file`:

```bash
python scripts/simulate.py strategy=hetlora dataset=banking77 client.learning_rate=1e-3
```

Defaults are those of the schema; a file of `conf/` may set others. A value out of its range, a name
that does not exist and settings that do not go together are refused in one line before anything
starts. Only settings marked {_RESUMABLE} may change when a run is resumed: they decide how
long, where and how fast it runs, not what is learned.
"""
_TYPE_WORDS: Final = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    list: "list",
    dict: "mapping",
    Any: "text or list",
}
_LIMIT_SIGNS: Final = {"at_least": "≥", "above": ">", "at_most": "≤", "below": "<"}
_PARAMETERS: Final = "Parameters\n----------\n"
_NEXT_SECTION: Final = re.compile(r"\n\S[^\n]*\n-{3,}\n")
_ENTRY: Final = re.compile(r"^(\S[^\n]*)\n((?:(?: {4}[^\n]*)?\n)+)", re.MULTILINE)


class _Row(NamedTuple):
    """A setting on the page: its name in its group, its field, its type and its description."""

    name: str
    field: "dataclasses.Field[Any]"
    type: Any
    text: str


def settings_reference() -> str:
    """Return the page, in Markdown."""
    hints = typing.get_type_hints(Settings)
    groups = {name: hint for name, hint in hints.items() if _is_group(hint)}
    plain = [row for row in _own_rows(Settings) if row.name not in (*groups, "strategy")]
    methods = {file.stem: _comment(file) for file in files_of("strategy")}
    sections = [
        f"## run\n\nThe run as a whole; these belong to no group.\n\n{_table(plain)}",
        "## strategy\n\nAggregation method and its hyper-parameters.\n",
        *(_strategy(name, comment) for name, comment in methods.items()),
        *(_group(name, group) for name, group in groups.items()),
    ]
    index = " · ".join(f"[{name}](#{name})" for name in ("run", "strategy", *groups))
    return "\n".join([_INTRODUCTION, f"{index}\n", *sections])


def descriptions(group: type) -> dict[str, str]:
    """Read the description of each field from the docstrings of a dataclass and its bases.

    Returns
    -------
    dict
        Name of the field to Markdown on one line.
    """
    found: dict[str, str] = {}
    for base in reversed(group.__mro__):
        if dataclasses.is_dataclass(base):
            _, _, section = (inspect.cleandoc(base.__doc__ or "") + "\n").partition(_PARAMETERS)
            for names, text in _ENTRY.findall(_NEXT_SECTION.split(section)[0]):
                found |= dict.fromkeys(map(str.strip, names.split(",")), _markdown(text))
    return found


def _own_rows(group: type) -> Iterator[_Row]:
    hints, texts = typing.get_type_hints(group), descriptions(group)
    for declared in dataclasses.fields(group):
        if declared.init:
            if declared.name not in texts:
                raise ValueError(
                    f"{group.__qualname__}: its docstring does not list {declared.name}"
                )
            yield _Row(declared.name, declared, hints[declared.name], texts[declared.name])


def _rows(group: type, prefix: str = "") -> Iterator[_Row]:
    """Yield the settings of a group, and below each those of the dataclasses that it is made of."""
    for row in _own_rows(group):
        name = f"{prefix}{row.name}"
        if _is_group(row.type):
            yield from _rows(row.type, f"{name}.")
            continue
        yield row._replace(name=name)
        element = typing.get_args(row.type)[-1:]
        if element and _is_group(element[0]):
            place = "[i]" if typing.get_origin(row.type) is list else ".<name>"
            yield from _rows(element[0], f"{name}{place}.")


def _is_group(hint: Any) -> TypeGuard[type]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _group(name: str, group: type) -> str:
    files = [f"- `{name}={file.stem}`: {_comment(file)}" for file in files_of(name)]
    parts = [f"## {name}", _summary(group), "\n".join(files), _table(_rows(group))]
    return "\n\n".join(part for part in parts if part)


def _strategy(name: str, comment: str) -> str:
    values: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
        merge_files([f"strategy={name}"]).strategy, resolve=False
    )
    method = method_class(values.pop("_target_"))
    return f"### {name}\n\n{comment}. {_summary(method)}\n\n{_table(_rows(method), values)}"


def _comment(file: Path) -> str:
    """Return the comment at the top of a file of `conf/`, on one line."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines).rstrip(".").replace("<", r"\<")


def _summary(group: type) -> str:
    first, *_ = inspect.cleandoc(group.__doc__ or "").split("\n\n")
    return _markdown(first)


def _table(rows: typing.Iterable[_Row], defaults: Mapping[str, Any] | None = None) -> str:
    """Return a table of settings; ``defaults`` go before those of the fields."""
    lines = ["| setting | value | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        mark = f" {_RESUMABLE}" if is_resumable(row.field) else ""
        default = (defaults or {}).get(row.name, default_of(row.field))
        lines.append(
            f"| {_code(row.name)}{mark} | {_value(row)} | {_default(default)} | {row.text} |"
        )
    return "\n".join(lines) + "\n"


def _value(row: _Row) -> str:
    """Write what a setting may be: its type, or its choices, and its range."""
    choices = row.field.metadata.get("choices")
    optional = types.NoneType in typing.get_args(row.type)
    words = ", ".join(map(_code, choices)) if choices else _type(row.type)
    limits = row.field.metadata.get("limits", {})
    signs = ", ".join(
        f"{_LIMIT_SIGNS[kind]} {limits[kind]:g}" for kind in LIMIT_WORDS if kind in limits
    )
    if signs and typing.get_origin(row.type) is list:
        words = "list of numbers"
    return f"{words}{f' {signs}' if signs else ''}{', or null' if optional else ''}"


def _type(hint: Any) -> str:
    inner = [part for part in typing.get_args(hint) if part is not types.NoneType]
    if isinstance(hint, types.UnionType):
        return _type(inner[0])
    return _TYPE_WORDS[typing.get_origin(hint) or hint]


def _default(value: Any) -> str:
    if value is None:
        return "null"
    if value == REQUIRED:
        return "required"
    if isinstance(value, str) and value.startswith("${"):
        return f"that of {_code(value[2:-1])}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:g}"
    return _code(value) if value else "empty"


def _code(value: Any) -> str:
    return f"`{value}`"


def _markdown(text: str) -> str:
    """Turn the text of a docstring into Markdown for a cell of a table."""
    return " ".join(text.split()).replace("``", "`").replace("|", r"\|")
