"""Allocate bits to transformer blocks by salience, under a memory budget.

Salience-driven block-wise quantization of the frozen base model, part of HAFLQ (Su, Yan, Deng,
Dohler and Schober, the second version of arXiv:2411.06581).

Differs from the paper: its formulas could not be read. That there is a salience of every block and
a precision that follows from it is known; the cosine between a block's input and output (as in Men
et al., "ShortGPT", arXiv:2403.03853, section 3) and the greedy choice are reconstructions.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hafl_app.training.batches import Batch, ImageBatch
from hafl_app.training.lora_model import LoraModel
from hafl_app.training.quantization.blocks import transformer_blocks
from hafl_app.training.quantization.precisions import PRECISIONS
from hafl_app.training.task import DeviceMemoryError

"""Value of the setting ``model.quantization`` for precisions by block."""


class BaseMemoryError(DeviceMemoryError):
    """A memory budget below what the base model takes in the lowest precision."""


class _Influence:
    """Mean of ``1 - cos(input, output)`` of one block over the tokens that are no padding."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None  # of images every patch counts
        self._total = self._tokens = 0.0

    @property
    def mean(self) -> float:
        if not self._tokens:
            raise ValueError("salience of the base model's blocks: no texts to measure it on")
        return self._total / self._tokens

    def __call__(self, block: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        before: Tensor = args[0] if args else kwargs["hidden_states"]
        after: Tensor = output if isinstance(output, Tensor) else output[0]
        change = 1 - nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        mask = torch.ones_like(change) if self.mask is None else self.mask
        self._total += float((change * mask).sum())
        self._tokens += float(mask.sum())


@torch.no_grad()
def salience(model: LoraModel, batches: Iterable[Batch | ImageBatch]) -> list[float]:
    """Measure each block's change of its tokens' hidden states, first block first.

    ``mean over tokens of 1 - cos(h_in, h_out)``, in [0, 2].

    Parameters
    ----------
    model
        With whatever factors are in it; it is left in evaluation mode.
    batches
        Some of a client's own data; padding does not count.

    Raises
    ------
    ValueError
        If there is no token.
    hafl_app.training.quantization.precisions.QuantizationError
        If the model has no transformer blocks.
    """
    model.eval()
    blocks = [block for _, block in transformer_blocks(model.base)]
    influences = [_Influence() for _ in blocks]
    hooks = [
        block.register_forward_hook(influence, with_kwargs=True)
        for block, influence in zip(blocks, influences, strict=True)
    ]
    try:
        for batch in batches:
            for influence in influences:
                influence.mask = batch.attention_mask if isinstance(batch, Batch) else None
            with model.computing("fp32"):
                model(*batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [influence.mean for influence in influences]


def allocate(
    saliences: Sequence[float], bytes_by_precision: Sequence[Mapping[str, int]], budget: int
) -> list[str]:
    """Return the precision of every block.

    All blocks start with the fewest bits. The block with the most salience for a byte more is
    raised by one precision, again and again, until no further raise fits into the budget.

    Parameters
    ----------
    saliences
        Of every block, at least 0.
    bytes_by_precision
        Bytes of every block in each of `PRECISIONS`.
    budget
        Bytes for all blocks together.

    Raises
    ------
    BaseMemoryError
        If the blocks do not fit even with the fewest bits.
    """
    levels = [0] * len(saliences)
    left = budget - sum(sizes[PRECISIONS[0]] for sizes in bytes_by_precision)
    if left < 0:
        raise BaseMemoryError(
            f"the transformer blocks take {(budget - left) / 1e6:.3g} MB in {PRECISIONS[0]}, and "
            f"{budget / 1e6:.3g} MB are there for them"
        )

    def cost(block: int) -> int:
        lower, higher = PRECISIONS[levels[block] : levels[block] + 2]
        return bytes_by_precision[block][higher] - bytes_by_precision[block][lower]

    while True:
        raisable = [b for b, level in enumerate(levels) if level + 1 < len(PRECISIONS)]
        fitting = [block for block in raisable if cost(block) <= left]
        if not fitting:
            return [PRECISIONS[level] for level in levels]
        # Of equal ones the first: the same data must give the same bits.
        best = max(fitting, key=lambda block: saliences[block] / cost(block))
        left -= cost(best)
        levels[best] += 1
