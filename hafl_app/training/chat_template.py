"""Conversations as token ids, by a model's chat template, and which tokens an assistant writes."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from jinja2 import TemplateError

from hafl_app.training.base_model import hash_word, hub_tokenizer
from hafl_app.training.chat_templates import CHAT_TEMPLATES, MARKS
from hafl_app.training.locate import ModelError
from hafl_app.training.settings import BaseSpec

_LOGGER = logging.getLogger(__name__)

Conversation = Sequence[Mapping[str, Any]]
"""Messages with ``role`` and ``content``; one of weight 0 is an assistant's that is not learned."""

TINY_END: Final = 0
"""Token behind an answer, for models without files; no word has this id."""

_MARKERS: Final = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_FIXED: Final = {"date_string": "26 Jul 2024"}
"""Variables of templates that would else write today's date: rows are the same on every day."""

_PROBE: Final = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


class ChatRow(NamedTuple):
    """A conversation in tokens.

    Parameters
    ----------
    ids
        Token ids.
    counts
        Whether each is one that the assistant writes: those count in the loss.
    """

    ids: list[int]
    counts: list[bool]


class ChatTokenizer(Protocol):
    """Tokens of conversations, the same in training and in generation."""

    @property
    def end(self) -> int | None:
        """Token that ends an assistant's turn; None if there is none."""

    def row(self, messages: Conversation) -> ChatRow:
        """Return a whole conversation that ends with an assistant's turn."""

    def prompt(self, messages: Conversation) -> list[int]:
        """Return a conversation up to where the assistant's next turn begins."""


def chat_tokenizer(spec: BaseSpec) -> ChatTokenizer:
    """Return the chat tokenizer of a base model; without files it hashes words.

    Raises
    ------
    ModelError
        If the model has no chat template, or its tokenizer cannot say where tokens are in a text.
    """
    if spec.is_without_files:
        return _HashedChat()
    return _TemplateChat(spec, hub_tokenizer(spec))


def fitted(
    messages: Conversation, length: Callable[[Conversation], int], most: int
) -> Conversation:
    """Return a conversation without as many of its oldest exchanges as must go for it to fit.

    An exchange begins with a user's message. System messages before the first and the last
    exchange stay, whether it then fits or not.

    Parameters
    ----------
    length
        Number of tokens of a conversation.
    most
        Tokens that it may have.
    """
    users = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if len(users) < 2 or length(messages) <= most:
        return messages
    first = next(p for p, message in enumerate(messages) if message["role"] != "system")
    begun = [*messages[:first]]
    low, high = 1, len(users) - 1
    while low < high:  # the fewest exchanges that must go
        middle = (low + high) // 2
        if length([*begun, *messages[users[middle] :]]) <= most:
            high = middle
        else:
            low = middle + 1
    return [*begun, *messages[users[low] :]]


class _TemplateChat:
    """Chat tokens by the template of a tokenizer, as ``apply_chat_template`` makes them.

    A template with generation markers says itself what the assistant writes. In another a turn
    begins where the messages before it and the generation prompt end, and ends where the messages
    up to it do, without white space behind; both must be beginnings of the whole text.
    """

    def __init__(self, spec: BaseSpec, tokenizer: Any) -> None:
        self._path = spec.path
        self._tokenizer = tokenizer
        template = _template_of(spec, tokenizer)
        self._template = template
        self._has_markers = _MARKERS.search(template) is not None
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"model.path={spec.path}: its tokenizer does not say where its tokens are in a "
                "text, which the loss on answers needs; expected one with a tokenizer.json"
            )

    @property
    def end(self) -> int | None:
        tokenizer = self._tokenizer
        single = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        row = self.row(_PROBE)
        written = [token for token, counts in zip(row.ids, row.counts, strict=True) if counts]
        eos = tokenizer.eos_token_id
        return next((t for t in reversed(written) if t in single), eos)

    def prompt(self, messages: Conversation) -> list[int]:
        ids: list[int] = self._tokenizer(
            self._rendered(messages, add_generation_prompt=True), add_special_tokens=False
        )["input_ids"]
        return ids

    def row(self, messages: Conversation) -> ChatRow:
        if self._has_markers:
            return self._marked(messages)
        text = self._rendered(messages)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        counts = [False] * len(encoded["input_ids"])
        for begin, end in self._turns(messages, text):
            for place, (at, _) in enumerate(encoded["offset_mapping"]):
                if begin <= at < end:
                    counts[place] = True
        return ChatRow(encoded["input_ids"], counts)

    def _marked(self, messages: Conversation) -> ChatRow:
        made = self._apply(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = made["input_ids"], [bool(one) for one in made["assistant_masks"]]
        runs = list(_runs(mask))
        weights = [_counts(message) for message in messages if message["role"] == "assistant"]
        if len(runs) != len(weights):
            raise ModelError(
                f"model.path={self._path}: its chat template marks other turns as generated than "
                f"the assistant's; {_INSTEAD}"
            )
        counts = [False] * len(ids)
        for (begin, end), is_learned in zip(runs, weights, strict=True):
            counts[begin:end] = [is_learned] * (end - begin)
        return ChatRow(ids, counts)

    def _turns(self, messages: Conversation, text: str) -> Iterator[tuple[int, int]]:
        """Yield start and end of every turn that counts, in characters."""
        for place, message in enumerate(messages):
            # The first message of all is no answer: nothing stands before it.
            if place == 0 or message["role"] != "assistant" or not _counts(message):
                continue
            before = self._rendered(messages[:place], add_generation_prompt=True)
            through = text
            if place + 1 < len(messages):
                through = self._rendered(messages[: place + 1])
            if not (text.startswith(before) and text.startswith(through)):
                raise ModelError(
                    f"model.path={self._path}: its chat template writes the beginning of a "
                    "conversation otherwise once it goes on, so an assistant's turns cannot be "
                    f"found; {_INSTEAD}"
                )
            yield len(before), len(through.rstrip())

    def _rendered(self, messages: Conversation, **how: Any) -> str:
        text: str = self._apply(messages, tokenize=False, **how)
        return text

    def _apply(self, messages: Conversation, **how: Any) -> Any:
        plain = [{"role": m["role"], "content": m["content"]} for m in messages]
        try:
            return self._tokenizer.apply_chat_template(
                plain, chat_template=self._template, **_FIXED, **how
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            # The message may leave this machine, so it quotes nothing; the log stays.
            _LOGGER.warning("the chat template of %s: %s", self._path, str(error)[:200])
            raise ModelError(
                f"model.path={self._path}: its chat template refuses a conversation of the data; "
                "most want a user's and the assistant's turns by turns, and some take no system "
                "message"
            ) from None


_INSTEAD: Final = (
    "set model.chat_template=instruction, or to a template with {% generation %} markers"
)


def _template_of(spec: BaseSpec, tokenizer: Any) -> str:
    """Return the chat template of the settings, else that of a tokenizer."""
    if spec.chat_template:
        return _given_template(spec, tokenizer)
    template = tokenizer.chat_template
    if isinstance(template, Mapping):  # named ones, of which `default` is for chat
        template = template.get("default")
    if not template:
        raise ModelError(
            f"model.path={spec.path} has no chat template; set model.chat_template=instruction, or "
            "give prompts by dataset.template and dataset.format=columns"
        )
    return str(template)


def _given_template(spec: BaseSpec, tokenizer: Any) -> str:
    given = str(spec.chat_template)
    known = tokenizer.get_vocab()
    if missing := [mark for mark in MARKS.get(given, ()) if mark not in known]:
        raise ModelError(
            f"model.chat_template={given}: the tokenizer of {spec.path} has no {missing[0]}; "
            "expected instruction, which needs no tokens of its own"
        )
    return CHAT_TEMPLATES.get(given, given)


def _counts(message: Mapping[str, Any]) -> bool:
    return bool(message.get("weight", 1))


def _runs(mask: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Yield start and end of every run of True."""
    begin = None
    for place, one in enumerate([*mask, False]):
        if one and begin is None:
            begin = place
        elif not one and begin is not None:
            yield begin, place
            begin = None


class _HashedChat:
    """Chat tokens of a model without files: a role, the words, and the end of a turn."""

    end = TINY_END

    def row(self, messages: Conversation) -> ChatRow:
        ids: list[int] = []
        counts: list[bool] = []
        for place, message in enumerate(messages):
            words = [hash_word(word) for word in message["content"].split()]
            is_learned = place > 0 and message["role"] == "assistant" and _counts(message)
            ids += [_role_token(message["role"]), *words, TINY_END]
            counts += [False, *[is_learned] * (len(words) + 1)]
        return ChatRow(ids, counts)

    def prompt(self, messages: Conversation) -> list[int]:
        return [*self.row(messages).ids, _role_token("assistant")]


def _role_token(role: str) -> int:
    return hash_word(f"<{role}>")
