"""Messages of one conversation, from the cells of a row: checked, and split before the answer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from hafl_app.data.template import is_missing

Message = dict[str, Any]
"""``role``: system, user or assistant; ``content``: text; ``weight``: 0 if it is not learned."""

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"

_ROLES: Final = {
    **{role: role for role in (SYSTEM, USER, ASSISTANT)},
    "developer": SYSTEM,
    "human": USER,
    "gpt": ASSISTANT,
}


class RowError(ValueError):
    """A row that is no conversation; the message says why and quotes nothing of it."""


def _from_messages(value: Any) -> list[Message]:
    return [_read_message(one) for one in _listed(value)]


def _from_completion(prompt: Any, completion: Any, system: Any) -> list[Message]:
    """Return a conversation of which the completion alone is learned, as TRL does."""
    if isinstance(prompt, str) and isinstance(completion, str):
        messages = [message_of(USER, prompt), message_of(ASSISTANT, completion)]
    else:
        asked = [{**_read_message(one), "weight": 0} for one in _listed(prompt)]
        messages = [*asked, *_from_messages(completion)]
    return [*_system(system, messages), *messages]


def _from_instruction(instruction: Any, output: Any, more: Any, system: Any) -> list[Message]:
    parts = [_text(value) for value in (instruction, more) if not is_missing(value)]
    asked = "\n\n".join(part for part in parts if part.strip())
    return [*_system(system), message_of(USER, asked), message_of(ASSISTANT, _text(output))]


READERS: Final[Mapping[str, Callable[..., list[Message]]]] = {
    "messages": _from_messages,
    "prompt_completion": _from_completion,
    "instruction": _from_instruction,
}
"""By kind: from a row's cells, in the order of its columns, to messages; raises `RowError`."""


def _system(value: Any, messages: Sequence[Message] = ()) -> list[Message]:
    """Return the message of a system column, if there is one."""
    if is_missing(value) or not _text(value).strip():
        return []
    if messages and messages[0]["role"] == SYSTEM:
        raise RowError("a system column beside a system message; expected one of them")
    return [message_of(SYSTEM, value)]


def before_answer(messages: list[Message]) -> tuple[list[Message], str]:
    """Return what stands before the last turn that is learned, and that turn's text.

    Raises
    ------
    RowError
        If there is no such turn, its text is blank, or a system message is not the first.
    """
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
    return message_of(_ROLES[role], content, int(weight))


def message_of(role: str, content: Any, weight: int = 1) -> Message:
    """Return a message, of weight 0 unless the assistant says it.

    Raises
    ------
    RowError
        If the content is no text.
    """
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
