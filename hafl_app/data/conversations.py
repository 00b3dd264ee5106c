"""Conversations from tables: messages, prompts with completions, or instructions.

Columns and keys are those of TRL's data sets (https://huggingface.co/docs/trl/dataset_formats),
and of Alpaca's and Dolly's instructions.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd

from hafl_app.data.errors import DataError, nearest
from hafl_app.data.settings import DatasetSettings
from hafl_app.data.tables import NOTES, standardize
from hafl_app.data.template import columns_of, is_missing, prompts, render

Message = dict[str, Any]
"""``role``: system, user or assistant; ``content``: text; ``weight``: 0 if it is not learned."""

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"

_ROLES: Final = {
    **{role: role for role in (SYSTEM, USER, ASSISTANT)},
    "developer": SYSTEM,
    "human": USER,
    "gpt": ASSISTANT,
}
_ANSWER: Final = " answer"  # a column's name that no file has
_ONE_CLASS_COLUMN: Final = " category"
ONE_CLASS: Final = "all"
"""Category of all rows that have none."""


class RowError(ValueError):
    """A row that is no conversation; the message says why and quotes nothing of it."""


class _Columns(NamedTuple):
    """Columns of a table, by what they are to a conversation; each alone, None without one."""

    names: tuple[str, ...]
    optional: tuple[str | None, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.names, *(name for name in self.optional if name))


def conversations_of(table: pd.DataFrame, source: DatasetSettings, origin: str) -> pd.DataFrame:
    """Return a table with the conversations that the settings ask for, see `with_conversations`.

    Raises
    ------
    DataError
        See `with_conversations`.
    """
    return with_conversations(
        table,
        source.format,
        source.label_column,
        origin,
        system_prompt=source.system_prompt,
        template=source.template,
        answer_column=source.answer_column,
        listed=source.label_names or (),
    )


def strings_of(source: DatasetSettings) -> tuple[str, ...]:
    """Return the columns of a csv file that stay text, whatever they look like."""
    return TEXT_COLUMNS if source.has_conversations and not source.template else ()


def with_conversations(
    table: pd.DataFrame,
    kind: str,
    label_column: str,
    origin: str,
    *,
    system_prompt: str | None = None,
    template: str | None = None,
    answer_column: str | None = None,
    listed: Iterable[str] = (),
) -> pd.DataFrame:
    """Add the columns ``text`` (messages), ``answer`` and ``label``; drop what they are made of.

    The messages are those before the last turn of the assistant that is learned, and the answer is
    that turn's text. What follows it is left out.

    Parameters
    ----------
    kind
        ``dataset.format``: ``messages``, ``prompt_completion``, ``instruction``, or ``chat`` for
        the one that the columns show.
    label_column
        Column of the row's category; empty for one category of all.
    origin
        File or folder, for messages.
    system_prompt
        First message of rows that have no system message.
    template, answer_column
        With ``chat``: the user's message, see `hafl_app.data.template.render`, and the answer.
    listed
        Names of categories that may differ as little as they like.

    Raises
    ------
    DataError
        If the columns are missing, or show more than one kind, or a row is no conversation: has no
        turn of the assistant, a role that is not known, or what is no text.
    """
    if template and answer_column:
        asked = [[_message(USER, text)] for text in prompts(table, template, origin)]
        note = f"a user's message by dataset.template, answers in {answer_column}"
    else:
        kind, columns = recognized(table.columns, kind, origin)
        asked, answers = _rows(table, kind, columns, origin)
        note = f"{kind}, by the columns {', '.join(columns.all)}"
        others = [name for name in columns.all if name != label_column]
        table, answer_column = table.drop(columns=others).assign(**{_ANSWER: answers}), _ANSWER
    if system_prompt:
        first = _message(SYSTEM, system_prompt)
        asked = [row if row[0]["role"] == SYSTEM else [first, *row] for row in asked]
    rows = table if label_column else table.assign(**{_ONE_CLASS_COLUMN: ONE_CLASS})
    label = label_column or _ONE_CLASS_COLUMN
    found = standardize(rows, answer_column, label, origin, listed=tuple(listed))
    made = found.assign(answer=found["text"]).assign(
        text=pd.Series(asked, index=found.index, dtype=object)
    )
    made = made.drop(columns=[_ANSWER, _ONE_CLASS_COLUMN], errors="ignore")
    made.attrs[NOTES] = (*found.attrs[NOTES], f"conversations: {note}")
    return made


def recognized(columns: Iterable[Any], kind: str, origin: str) -> tuple[str, _Columns]:
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


def _of_messages(names: Sequence[str]) -> _Columns | None:
    column = _one_of(names, "messages", "conversations")
    return _Columns((column,)) if column else None


def _of_completions(names: Sequence[str]) -> _Columns | None:
    if not {"prompt", "completion"} <= set(names):
        return None
    return _Columns(("prompt", "completion"), (_one_of(names, SYSTEM),))


def _of_instructions(names: Sequence[str]) -> _Columns | None:
    answer = _one_of(names, "output", "response")
    if "instruction" not in names or answer is None:
        return None
    more = _one_of(names, "input", "context")
    if more is None and {"input", "context"} <= set(names):
        return None
    return _Columns(("instruction", answer), (more, _one_of(names, SYSTEM)))


_KINDS: Final[Mapping[str, Callable[[Sequence[str]], _Columns | None]]] = {
    "messages": _of_messages,
    "prompt_completion": _of_completions,
    "instruction": _of_instructions,
}


def _rows(
    table: pd.DataFrame, kind: str, columns: _Columns, origin: str
) -> tuple[list[list[Message]], list[str]]:
    """Return messages and answer of every row, or refuse the table for the first that has none."""
    if table.empty:
        raise DataError(f"{origin} has no rows")
    places = (*columns.names, *columns.optional)
    cells = [table[name] if name else [None] * len(table) for name in places]
    read, asked, answers = _READERS[kind], [], []
    faults: dict[str, list[int]] = {}
    for number, values in enumerate(zip(*cells, strict=True), 1):
        try:
            messages, answer = _split(read(*values))
        except RowError as error:
            faults.setdefault(str(error), []).append(number)
        else:
            asked.append(messages)
            answers.append(answer)
    for fault, numbers in faults.items():
        more = f" (and {len(numbers) - 1} more)" if len(numbers) > 1 else ""
        raise DataError(f"{origin}, row {numbers[0]}{more}: {fault}")
    return asked, answers


def _from_messages(value: Any) -> list[Message]:
    return [_read_message(one) for one in _listed(value)]


def _from_completion(prompt: Any, completion: Any, system: Any) -> list[Message]:
    """Return a conversation of which the completion alone is learned, as TRL does."""
    if isinstance(prompt, str) and isinstance(completion, str):
        messages = [_message(USER, prompt), _message(ASSISTANT, completion)]
    else:
        asked = [{**_read_message(one), "weight": 0} for one in _listed(prompt)]
        messages = [*asked, *_from_messages(completion)]
    return [*_system(system, messages), *messages]


def _from_instruction(instruction: Any, output: Any, more: Any, system: Any) -> list[Message]:
    parts = [_text(value) for value in (instruction, more) if not is_missing(value)]
    asked = "\n\n".join(part for part in parts if part.strip())
    return [*_system(system), _message(USER, asked), _message(ASSISTANT, _text(output))]


_READERS: Final[Mapping[str, Callable[..., list[Message]]]] = {
    "messages": _from_messages,
    "prompt_completion": _from_completion,
    "instruction": _from_instruction,
}


def _system(value: Any, messages: Sequence[Message] = ()) -> list[Message]:
    """Return the message of a system column, if there is one."""
    if is_missing(value) or not _text(value).strip():
        return []
    if messages and messages[0]["role"] == SYSTEM:
        raise RowError("a system column beside a system message; expected one of them")
    return [_message(SYSTEM, value)]


def _split(messages: list[Message]) -> tuple[list[Message], str]:
    """Return what stands before the last turn that is learned, and that turn's text."""
    if messages and messages[0]["role"] == ASSISTANT:
        messages = [{**messages[0], "weight": 0}, *messages[1:]]  # it answers nothing
    if any(message["role"] == SYSTEM for message in messages[1:]):
        raise RowError("a system message behind others; expected it first")
    turns = [i for i, m in enumerate(messages) if m["role"] == ASSISTANT and m["weight"]]
    if not turns:
        raise RowError("no assistant's turn to learn; expected a message of the role assistant")
    answer = messages[turns[-1]]["content"]
    if not answer.strip():
        raise RowError("the last answer is blank; expected text")
    return messages[: turns[-1]], answer


def _read_message(value: Any) -> Message:
    if not isinstance(value, Mapping):
        raise RowError("a message that is no object; expected role and content")
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if value.get("tool_calls") is not None and len(value["tool_calls"]):
        raise RowError("a message with tool_calls, which are not supported; expected text")
    if not isinstance(role, str) or role not in _ROLES:
        raise RowError("a role that is not known; expected system, user or assistant")
    weight = value.get("weight")
    weight = 1 if is_missing(weight) else weight
    if weight not in (0, 1):
        raise RowError("a weight that is neither 0 nor 1")
    return _message(_ROLES[role], content, int(weight))


def _message(role: str, content: Any, weight: int = 1) -> Message:
    return {"role": role, "content": _text(content), "weight": weight if role == ASSISTANT else 0}


def _text(value: Any) -> str:
    """Return a text, or the texts of parts that are all text, one after another."""
    if isinstance(value, list | np.ndarray):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in value]
        value = "".join(parts) if parts and all(isinstance(p, str) for p in parts) else None  # type: ignore[arg-type]
    if not isinstance(value, str):
        raise RowError("a message or column without text; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError("half a surrogate pair; expected text") from None
    return value


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list | np.ndarray) or not len(value):
        raise RowError("no list of messages (a csv file has none); expected role and content each")
    return list(value)


def typed_prompt(
    text: str,
    *,
    kind: str = "columns",
    template: str | None = None,
    system_prompt: str | None = None,
    before: Sequence[Message] = (),
) -> str | list[Message]:
    """Return the prompt of a text that somebody types, as the training's were.

    Parameters
    ----------
    text
        Goes into the template's first column, if there is a template; its others are blank.
    kind
        ``dataset.format`` of the training: ``columns`` makes a text, all others a conversation.
    template
        ``dataset.template`` of the training.
    system_prompt
        First message of a conversation.
    before
        Messages of the conversation so far, without a system message.

    Raises
    ------
    DataError
        If the template names no column.
    """
    if template:
        first, *others = columns_of(template)
        text = render(template, {first: text, **dict.fromkeys(others, "")})
    if kind == "columns":
        return text
    first_message = [_message(SYSTEM, system_prompt)] if system_prompt else []
    return [*first_message, *before, _message(USER, text)]


def prompt_facts(source: DatasetSettings) -> dict[str, Any]:
    """Return what `typed_prompt` must know of the training, for an adapter's card."""
    return {
        "template": source.template,
        "format": source.format,
        "system_prompt": source.system_prompt,
    }


def as_key(prompt: Any) -> str:
    """Return a prompt as one text, by which equal ones are found."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt)
