"""Columns by which a table shows what kind of conversations it has."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from hafl_app.data.errors import DataError, nearest
from hafl_app.data.messages import SYSTEM


class Columns(NamedTuple):
    """Columns of a table, those that it must have and those that it may, None without one."""

    names: tuple[str, ...]
    optional: tuple[str | None, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """All that the table has."""
        return (*self.names, *(name for name in self.optional if name))


def recognized(columns: Iterable[Any], kind: str, origin: str) -> tuple[str, Columns]:
    """Return the kind of conversations that a table has, and its columns.

    Raises
    ------
    DataError
        If it has none, or several and ``kind`` does not say which.
    """
    names = [str(column) for column in columns]
    found = {name: made for name, of in _KINDS.items() if (made := of(names))}
    wanted = found if kind == "chat" else {kind: found[kind]} if kind in found else {}
    if len(wanted) == 1:
        return next(iter(wanted.items()))
    shown = ", ".join(name[:30] for name in names[:20])
    if wanted:
        raise DataError(
            f"{origin} has the columns of {' and of '.join(wanted)}; expected "
            f"dataset.format={' or '.join(wanted)}"
        )
    needed = "; ".join(_NEEDED.values() if kind == "chat" else [_NEEDED[kind]])
    raise DataError(
        f"dataset.format={kind}: {origin} has no such columns, only {shown}; expected {needed}"
        f"{_hint(names)}"
    )


_NEEDED: Final = {
    "messages": "messages (or conversations)",
    "prompt_completion": "prompt and completion",
    "instruction": "instruction and output (or response), with input (or context) if there is one",
}
TEXT_COLUMNS: Final = (
    "prompt", "completion", "instruction", "input", "context", "output", "response", SYSTEM,
)  # fmt: skip
"""Columns of a csv file that stay text, whatever they look like."""


def _hint(names: Sequence[str]) -> str:
    known = ("messages", "conversations", *TEXT_COLUMNS)
    return next((hint for name in names if (hint := nearest(name, known))), "")


def _one_of(names: Sequence[str], *alternatives: str) -> str | None:
    """Return the one that a table has; None without any, or with several."""
    there = [name for name in alternatives if name in names]
    return there[0] if len(there) == 1 else None


def _of_messages(names: Sequence[str]) -> Columns | None:
    column = _one_of(names, "messages", "conversations")
    return Columns((column,)) if column else None


def _of_completions(names: Sequence[str]) -> Columns | None:
    if not {"prompt", "completion"} <= set(names):
        return None
    return Columns(("prompt", "completion"), (_one_of(names, SYSTEM),))


def _of_instructions(names: Sequence[str]) -> Columns | None:
    answer = _one_of(names, "output", "response")
    if "instruction" not in names or answer is None:
        return None
    more = _one_of(names, "input", "context")
    if more is None and {"input", "context"} <= set(names):
        return None
    return Columns(("instruction", answer), (more, _one_of(names, SYSTEM)))


_KINDS: Final[Mapping[str, Callable[[Sequence[str]], Columns | None]]] = {
    "messages": _of_messages,
    "prompt_completion": _of_completions,
    "instruction": _of_instructions,
}
