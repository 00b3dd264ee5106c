"""Prompts and their answers as token ids."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

from hafl_app.training.base_model import hash_word, hub_tokenizer
from hafl_app.training.settings import BaseSpec

TokenizePairs = Callable[[list[str], list[str]], tuple[list[list[int]], list[int]]]

_TINY_END: Final = 0  # of an answer, for models without files; no word has this id


@functools.lru_cache(maxsize=4)
def load_pair_tokenizer(spec: BaseSpec, max_length: int) -> TokenizePairs:
    """Return a function from prompts and answers to rows of token ids, and where answers start.

    Prompt and answer become tokens each by itself, so that a prompt has the same tokens when its
    answer is still to be generated. The row begins as the tokenizer begins a text, ends with its
    end-of-sequence token if it has one, and is cut to ``max_length`` from the right. Where the
    prompt alone fills it, the answer starts behind the row's end.

    Raises
    ------
    hafl_app.training.locate.ModelError
        If the tokenizer is not there.
    """
    if spec.is_without_files:
        return functools.partial(_joined, _hashed, _hashed, [_TINY_END], max_length)
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
) -> tuple[list[list[int]], list[int]]:
    begun, ended = first(prompts), then(answers)
    rows = [
        [*prompt, *answer, *end][:max_length] for prompt, answer in zip(begun, ended, strict=True)
    ]
    return rows, [len(prompt) for prompt in begun]


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
