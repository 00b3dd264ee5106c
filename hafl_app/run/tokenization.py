"""Tokenization of a run's texts: lazy tokenizers, their and keys of what is kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from hafl_app.data.text import MaskedRows, Prompt, Tokenize, TokenizePairs
from hafl_app.kept import cache_folder
from hafl_app.training.base_model import CAUSAL_LM, load_tokenizer
from hafl_app.training.prompts import load_pair_tokenizer
from hafl_app.training.settings import BaseSpec


class Tokenizing(TypedDict):
    """Keyword arguments of the classes that encode text.

    Parameters
    ----------
    tokenize
        Texts to token ids.
    tokenizer_key
        Identifies the tokenizer and its cut in the cache.
    cache
        Folder of tokenized data; None for no cache.
    """

    tokenize: Tokenize
    tokenizer_key: str
    cache: Path | None


def tokenizing(spec: BaseSpec, max_length: int) -> Tokenizing:
    """Return the tokenization of a base model; the tokenizer is loaded with the first text.

    Parameters
    ----------
    max_length
        Of a text in tokens, at least 1.
    """
    return Tokenizing(
        tokenize=_LazyTokenizer(spec, max_length),
        tokenizer_key=_tokenizer_key(spec, max_length),
        cache=cache_folder(),
    )


def pair_tokenizer(spec: BaseSpec, max_length: int) -> TokenizePairs | None:
    """Return the tokenizer of prompts with answers; None if the task has none."""
    return _LazyPairTokenizer(spec, max_length) if spec.task == CAUSAL_LM else None


class _LazyTokenizer:
    """Loads the tokenizer with the first text, so that counting rows needs none."""

    def __init__(self, spec: BaseSpec, max_length: int) -> None:
        self._spec = spec
        self._max_length = max_length

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return load_tokenizer(self._spec, self._max_length)(texts)


class _LazyPairTokenizer:
    """A tokenizer of prompts with answers that is loaded at its first use."""

    def __init__(self, spec: BaseSpec, max_length: int) -> None:
        self._spec = spec
        self._max_length = max_length

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> MaskedRows:
        return load_pair_tokenizer(self._spec, self._max_length)(prompts, answers)


def _tokenizer_key(spec: BaseSpec, max_length: int) -> str:
    # A tokenizer of the model's own code may cut texts otherwise.
    code = "/own code" if spec.trust_remote_code else ""
    template = f"/{spec.chat_template}" if spec.chat_template else ""
    return f"{spec.path}@{spec.revision}{_changed(spec.path)}/{max_length}{code}{template}"


def _changed(path: str) -> str:
    """Return when the tokenizer or chat template of a local folder last changed; else nothing."""
    folder = Path(path).expanduser() if path else None
    if folder is None or not folder.is_dir():
        return ""
    files = [*folder.glob("*token*.json"), *folder.glob("chat_template*")]
    return f"/{max((file.stat().st_mtime_ns for file in files), default=0)}"
