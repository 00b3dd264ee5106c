"""Prompts and their answers as token ids, and which of them count in the loss."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

from hafl_app.training.base_model import hash_word, hub_tokenizer
from hafl_app.training.chat_template import (
    TINY_END,
    ChatTokenizer,
    Conversation,
    chat_tokenizer,
    fitted,
)
from hafl_app.training.settings import BaseSpec

Prompt = str | Conversation
"""A text that an answer follows as it is, or messages, which a chat template puts together."""

MaskedRows = tuple[list[list[int]], list[list[bool]], list[bool]]
"""Token ids of rows; whether each token counts in the loss; whether each row was cut."""

TokenizePairs = Callable[[Sequence[Prompt], Sequence[str]], MaskedRows]

_ASSISTANT: Final = "assistant"


@functools.lru_cache(maxsize=4)
def load_pair_tokenizer(spec: BaseSpec, max_length: int) -> TokenizePairs:
    """Return a function from prompts and answers to rows of tokens.

    A row has at most ``max_length`` tokens. Of a conversation that is longer the oldest exchanges
    go first, see `hafl_app.training.chat_template.fitted`. Then a row is cut from the right, so
    that prompt and beginning of the answer stay. Where the prompt alone fills it, no token counts.

    Text: prompt and answer become tokens each by itself, so that a prompt has the same tokens when
    its answer is still to be generated. The row begins as the tokenizer begins a text, and ends
    with its end-of-sequence token if it has one. The answer's tokens count.

    Conversations: rows are what the chat template makes of them, and the tokens of every turn of
    the assistant count, but those of weight 0.

    Raises
    ------
    hafl_app.training.locate.ModelError
        If the tokenizer is not there; with the first conversation, if the model has no chat
        template, or one by which the assistant's turns cannot be found.
    """

    def tokenize(prompts: Sequence[Prompt], answers: Sequence[str]) -> MaskedRows:
        if not prompts:
            return [], [], []
        if isinstance(prompts[0], str):
            return _text_pairs(spec, max_length)(list(prompts), list(answers))  # type: ignore[arg-type]
        chat = _chat(spec)
        rows = [
            _chat_row(chat, [*prompt, {"role": _ASSISTANT, "content": answer}], max_length)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        ids, counts, is_cut = zip(*rows, strict=True)
        return list(ids), list(counts), list(is_cut)

    return tokenize


def prompt_tokens(spec: BaseSpec, prompt: Prompt, max_length: int) -> list[int]:
    """Return a prompt's tokens as in training; none where it leaves no room within a length.

    Of a conversation that is too long the oldest exchanges go first, as in training.

    Raises
    ------
    hafl_app.training.locate.ModelError
        See `load_pair_tokenizer`.
    """
    if isinstance(prompt, str):
        (tokens,), (counts,), _ = load_pair_tokenizer(spec, max_length + 1)([prompt], [""])
        start = counts.index(True) if True in counts else len(tokens)
        return tokens[:start] if start < max_length else []
    chat = _chat(spec)
    kept = fitted(prompt, lambda messages: len(chat.prompt(messages)), max_length - 1)
    tokens = chat.prompt(kept)
    return tokens if len(tokens) < max_length else []


def answer_end(spec: BaseSpec, prompt: Prompt) -> int | None:
    """Return the token that ends the answer to a prompt; None if there is none.

    Raises
    ------
    hafl_app.training.locate.ModelError
        See `load_pair_tokenizer`.
    """
    if not isinstance(prompt, str):
        return _chat(spec).end
    if spec.is_without_files:
        return TINY_END
    end = hub_tokenizer(spec).eos_token_id
    return None if end is None else int(end)


def token_decoder(spec: BaseSpec) -> Callable[[list[int]], str]:
    """Return a function from tokens to text, special tokens included; without files to numbers.

    Raises
    ------
    hafl_app.training.locate.ModelError
        If the tokenizer is not there.
    """
    if spec.is_without_files:
        return lambda ids: " ".join(map(str, ids))
    tokenizer = hub_tokenizer(spec)
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))


_chat = functools.lru_cache(maxsize=4)(chat_tokenizer)


def _chat_row(
    chat: ChatTokenizer, messages: Conversation, max_length: int
) -> tuple[list[int], list[bool], bool]:
    kept = fitted(messages, lambda some: len(chat.row(some).ids), max_length)
    ids, counts = chat.row(kept)
    is_cut = len(kept) < len(messages) or len(ids) > max_length
    return ids[:max_length], counts[:max_length], is_cut


@functools.lru_cache(maxsize=4)
def _text_pairs(spec: BaseSpec, max_length: int) -> Callable[[list[str], list[str]], MaskedRows]:
    if spec.is_without_files:
        return functools.partial(_joined, _hashed, _hashed, [TINY_END], max_length)
    tokenizer = hub_tokenizer(spec)
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]

    def first(texts: list[str]) -> list[list[int]]:
        # Some tokenizers end every text: here the answer goes on.
        rows = _ids(tokenizer, texts, add_special_tokens=True)
        return [row[:-1] if end and row[-1:] == end and len(row) > 1 else row for row in rows]

    def then(texts: list[str]) -> list[list[int]]:
        return _ids(tokenizer, texts, add_special_tokens=False)

    return functools.partial(_joined, first, then, end, max_length)


def _joined(
    first: Callable[[list[str]], list[list[int]]],
    then: Callable[[list[str]], list[list[int]]],
    end: Sequence[int],
    max_length: int,
    prompts: list[str],
    answers: list[str],
) -> MaskedRows:
    pairs = list(zip(first(prompts), then(answers), strict=True))
    rows = [[*prompt, *answer, *end] for prompt, answer in pairs]
    counts = [
        [place >= len(prompt) for place in range(len(row))]
        for row, (prompt, _) in zip(rows, pairs, strict=True)
    ]
    return (
        [row[:max_length] for row in rows],
        [mask[:max_length] for mask in counts],
        [len(row) > max_length for row in rows],
    )


def _ids(tokenizer: Any, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _hashed(texts: list[str]) -> list[list[int]]:
    return [[hash_word(word) for word in text.split()] for text in texts]
