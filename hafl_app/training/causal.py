"""A causal language model with swappable LoRA factors, trained on answers to prompts."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from hafl_app.training.batches import Batch, Examples, make_batch
from hafl_app.training.lora_model import LoraModel, LoraSpec
from hafl_app.training.settings import BaseSpec

IGNORED: Final = -100
"""Label of a token that is no target: cross entropy leaves it out."""


@dataclass(frozen=True)
class CausalSpec:
    """Identity of a causal language model's weights before training.

    Parameters
    ----------
    base
        The frozen base model.
    target_modules
        ``all-linear`` for every linear layer but the one that makes the logits, or names (or ends
        of names) of modules.
    lora_dropout
        Dropout before the trainable factors, in [0, 1).
    seed
        Of random weights.
    """

    base: BaseSpec
    target_modules: str | tuple[str, ...] = "all-linear"
    lora_dropout: float = 0.0
    seed: int = 0

    @property
    def num_labels(self) -> int:
        """None: there is no head."""
        return 0

    def build(self) -> "LoraCausalLM":
        """Return the model."""
        return LoraCausalLM(self)

    def initial_head(self) -> dict[str, Tensor]:
        """Return no tensors: there is no head to train or to send."""
        return {}

    def unadapted(self, base: PreTrainedModel) -> nn.Module:
        """Return the layer that makes the logits."""
        layer = base.get_output_embeddings()  # type: ignore[no-untyped-call]
        return layer if isinstance(layer, nn.Module) else nn.Identity()


class LoraCausalLM(LoraModel):
    """A causal language model whose LoRA factors are replaced in place, whatever their ranks."""

    def _make_head(self, spec: LoraSpec) -> nn.Module:
        return nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits of shape ``(batch, length, vocabulary)``; padding is on the right."""
        logits: Tensor = self.base(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits

    def batch(self, examples: Examples, rows: NDArray[np.int64]) -> Batch:
        """Return padded rows; labels of shape ``(rows, length)`` are the tokens that count.

        Raises
        ------
        ValueError
            If the examples have no answers.
        """
        padded = make_batch(examples, rows, self.device)
        mask = _loss_mask(examples)
        counts = np.zeros(padded.input_ids.shape, dtype=bool)
        for place, row in enumerate(rows):
            begin, end = examples.offsets[row : row + 2]
            counts[place, : end - begin] = mask[begin:end]
        labels = padded.input_ids.where(torch.from_numpy(counts).to(self.device), IGNORED)
        return Batch(padded.input_ids, padded.attention_mask, labels)

    def predictions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits ``(rows, length - 1, vocabulary)`` and what they are to predict.

        The targets have shape ``(rows, length - 1)``, and `IGNORED` where there is nothing to
        predict.
        """
        logits = self(batch.input_ids, batch.attention_mask)
        return logits[:, :-1], batch.labels[:, 1:]

    def num_targets(self, examples: Examples, rows: NDArray[np.int64]) -> int:
        """Count the tokens that count in the loss."""
        mask, offsets = _loss_mask(examples), examples.offsets
        return sum(int(mask[offsets[row] : offsets[row + 1]].sum()) for row in rows)

    def labels_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Return one label a token."""
        return shape


def _loss_mask(examples: Examples) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] | None = getattr(examples, "loss_mask", None)
    if mask is None:
        raise ValueError("model.task=causal_lm: the examples have no answers")
    return mask
