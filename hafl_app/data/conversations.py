"""Conversations from tables: messages, prompts with completions, or instructions.

Columns and keys are those of TRL's data sets (https://huggingface.co/docs/trl/dataset_formats),
and of Alpaca's and Dolly's instructions.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

import pandas as pd

from hafl_app.data.conversation_columns import TEXT_COLUMNS, Columns, recognized
from hafl_app.data.errors import DataError
from hafl_app.data.messages import (
    READERS,
    SYSTEM,
    USER,
    Message,
    RowError,
    before_answer,
    message_of,
)
from hafl_app.data.settings import DatasetSettings
from hafl_app.data.tables import NOTES, standardize
from hafl_app.data.template import filled, prompts

_ANSWER: Final = " answer"  # a column's name that no file has
_ONE_CLASS_COLUMN: Final = " category"
ONE_CLASS: Final = "all"
"""Category of all rows that have none."""


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
        asked = [[message_of(USER, text)] for text in prompts(table, template, origin)]
        note = f"a user's message by dataset.template, answers in {answer_column}"
    else:
        table, asked, note = _read(table, kind, label_column, origin)
        answer_column = _ANSWER
    if system_prompt:
        asked = _with_system(asked, system_prompt)
    rows = table if label_column else table.assign(**{_ONE_CLASS_COLUMN: ONE_CLASS})
    label = label_column or _ONE_CLASS_COLUMN
    found = standardize(rows, answer_column, label, origin, listed=tuple(listed))
    made = found.assign(answer=found["text"]).assign(
        text=pd.Series(asked, index=found.index, dtype=object)
    )
    made = made.drop(columns=[_ANSWER, _ONE_CLASS_COLUMN], errors="ignore")
    made.attrs[NOTES] = (*found.attrs[NOTES], f"conversations: {note}")
    return made


def _read(
    table: pd.DataFrame, kind: str, label_column: str, origin: str
) -> tuple[pd.DataFrame, list[list[Message]], str]:
    """Read conversations from their columns; return the table with answers alone, and a note."""
    kind, columns = recognized(table.columns, kind, origin)
    asked, answers = _rows(table, kind, columns, origin)
    others = [name for name in columns.all if name != label_column]
    rest = table.drop(columns=others).assign(**{_ANSWER: answers})
    return rest, asked, f"{kind}, by the columns {', '.join(columns.all)}"


def _with_system(asked: list[list[Message]], system_prompt: str) -> list[list[Message]]:
    """Begin every conversation that has no system message with this one."""
    first = message_of(SYSTEM, system_prompt)
    return [row if row[0]["role"] == SYSTEM else [first, *row] for row in asked]


def _rows(
    table: pd.DataFrame, kind: str, columns: Columns, origin: str
) -> tuple[list[list[Message]], list[str]]:
    """Return messages and answer of every row, or refuse the table for the first that has none."""
    if table.empty:
        raise DataError(f"{origin} has no rows")
    places = (*columns.names, *columns.optional)
    cells = [table[name] if name else [None] * len(table) for name in places]
    read, asked, answers = READERS[kind], [], []
    faults: dict[str, list[int]] = {}
    for number, values in enumerate(zip(*cells, strict=True), 1):
        try:
            messages, answer = before_answer(read(*values))
        except RowError as error:
            faults.setdefault(str(error), []).append(number)
        else:
            asked.append(messages)
            answers.append(answer)
    for fault, numbers in faults.items():
        more = f" (and {len(numbers) - 1} more)" if len(numbers) > 1 else ""
        raise DataError(f"{origin}, row {numbers[0]}{more}: {fault}")
    return asked, answers


def typed_prompt(
    text: str,
    *,
    kind: str = "columns",
    template: str | None = None,
    system_prompt: str | None = None,
    before: Sequence[Message] = (),
) -> str | list[Message]:
    """Return the prompt of a typed text, as the training's were.

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
        text = filled(template, text)
    if kind == "columns":
        return text
    first_message = [message_of(SYSTEM, system_prompt)] if system_prompt else []
    return [*first_message, *before, message_of(USER, text)]


def prompt_facts(source: DatasetSettings) -> dict[str, Any]:
    """Return what `typed_prompt` must know of the training, for an adapter's card."""
    return {
        "template": source.template,
        "format": source.format,
        "system_prompt": source.system_prompt,
    }


def as_text(prompt: Any) -> str:
    """Return a prompt for a reader: a text as it is, messages with their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def as_key(prompt: Any) -> str:
    """Return a prompt as one text, by which equal ones are found."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt)
