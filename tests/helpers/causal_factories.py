"""Fixtures of the tests of causal language models: the built-in tiny Llama and its rows."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hafl_app.training.causal import CausalSpec
from hafl_app.training.settings import BaseSpec

TINY_CAUSAL = BaseSpec("", random_weights=True, task="causal_lm")
CAUSAL = CausalSpec(TINY_CAUSAL, seed=7)


@dataclass(frozen=True)
class Pairs:
    """Prompts and answers as token ids, end to end."""

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]


def pairs_of(pairs: list[tuple[list[int], list[int]]]) -> Pairs:
    rows = [[*prompt, *answer] for prompt, answer in pairs]
    return Pairs(
        np.array([token for row in rows for token in row], dtype=np.int32),
        np.cumsum([0, *map(len, rows)]).astype(np.int64),
        np.zeros(len(rows), dtype=np.int64),
        np.array([c for prompt, answer in pairs for c in _counts(prompt, answer)], dtype=bool),
    )


def _counts(prompt: list[int], answer: list[int]) -> list[bool]:
    """Return which tokens count: the answer's, but never the first of a row."""
    return [place >= max(len(prompt), 1) for place in range(len(prompt) + len(answer))]


def random_pairs(number: int, seed: int = 0) -> Pairs:
    """Return prompts of 1 to 6 tokens and answers of 1 to 9, both of unequal lengths."""
    rng = np.random.default_rng(seed)

    def draw(longest: int) -> list[int]:
        return rng.integers(1, 512, rng.integers(1, longest + 1)).tolist()

    return pairs_of([(draw(6), draw(9)) for _ in range(number)])
