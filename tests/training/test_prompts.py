"""Prompts and answers as tokens: where answers start, how rows end, and where they are cut."""

from pathlib import Path

import pytest
from causal_factories import TINY_CAUSAL
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, PreTrainedTokenizerFast

from hafl_app.training.prompts import load_pair_tokenizer
from hafl_app.training.settings import BaseSpec

WORDS = ["<s>", "</s>", "<unk>", "name", "a", "color", "red", "blue"]


def base_with_tokenizer(path: Path, template: str) -> BaseSpec:
    """Save a tokenizer of whole words that puts special tokens around a text."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(path)
    LlamaConfig().save_pretrained(path)
    return BaseSpec(str(path), task="causal_lm")


def with_starts(made):
    """Return rows, where their tokens begin to count, and which are cut."""
    rows, counts, cut = made
    starts = [mask.index(True) if True in mask else len(mask) for mask in counts]
    assert [mask[start:] for mask, start in zip(counts, starts, strict=True)] == [
        [True] * (len(mask) - start) for mask, start in zip(counts, starts, strict=True)
    ]
    return rows, starts, cut


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_a_row_begins_and_ends_once(tmp_path, template):
    tokenize = load_pair_tokenizer(base_with_tokenizer(tmp_path, template), 16)

    rows, starts, _ = with_starts(tokenize(["name a color", "name"], ["red", "a blue color"]))

    assert rows == [[0, 3, 4, 5, 6, 1], [0, 3, 4, 7, 5, 1]]
    assert starts == [4, 2]


def test_a_prompt_has_the_same_tokens_whatever_its_answer(tmp_path):
    tokenize = load_pair_tokenizer(base_with_tokenizer(tmp_path, "<s> $A"), 16)

    rows, starts, _ = with_starts(tokenize(["name a color"] * 2, ["red", ""]))

    assert starts[0] == starts[1]
    assert rows[0][: starts[0]] == rows[1][: starts[1]]


def test_rows_are_cut_from_the_right(tmp_path):
    tokenize = load_pair_tokenizer(base_with_tokenizer(tmp_path, "<s> $A"), 4)

    rows, starts, cut = with_starts(
        tokenize(["name", "name a color a name", "a"], ["red blue red", "red", "red"])
    )

    assert rows == [[0, 3, 6, 7], [0, 3, 4, 5], [0, 4, 6, 1]]
    assert starts == [2, 4, 2]  # of the second nothing is left
    assert cut == [True, True, False]


def test_a_model_without_files_hashes_words():
    tokenize = load_pair_tokenizer(TINY_CAUSAL, 8)
    rows, starts, _ = with_starts(tokenize(["one two", "one"], ["three", "two three"]))

    assert [len(row) for row in rows] == [4, 4]
    assert rows[0][:3] == rows[1][:3]
    assert starts == [2, 1]
    assert rows[0][-1] == rows[1][-1] == 0
    assert 0 not in rows[0][:-1]


def test_nothing_is_nothing(tmp_path):
    tokenize = load_pair_tokenizer(base_with_tokenizer(tmp_path, "<s> $A"), 4)
    assert tokenize([], []) == ([], [], [])
