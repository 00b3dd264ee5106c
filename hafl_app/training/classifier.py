"""A base model with a classification head and swappable LoRA factors."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from hafl_app.training.base_model import base_without_weights
from hafl_app.training.batches import Batch, Examples, make_batch
from hafl_app.training.locate import ModelError
from hafl_app.training.lora_model import LoraModel, LoraSpec, resident_model
from hafl_app.training.settings import BaseSpec


@dataclass(frozen=True)
class ClassifierSpec:
    """Identity of a classifier's weights before training.

    Parameters
    ----------
    base
        The frozen base model.
    num_labels
        Classes, at least 2.
    target_modules
        ``all-linear`` for every linear layer of the encoder, or names (or ends of names) of
        modules.
    lora_dropout
        Dropout before the trainable factors, in [0, 1).
    seed
        Of the head's initial weights.
    """

    base: BaseSpec
    num_labels: int
    target_modules: str | tuple[str, ...] = "all-linear"
    lora_dropout: float = 0.0
    seed: int = 0

    def build(self) -> "LoraClassifier":
        """Return the classifier."""
        return LoraClassifier(self)

    def initial_head(self) -> dict[str, Tensor]:
        """Return the head's tensors before training.

        With mean pooling the base model's weights are not needed. With ``cls`` the head may be
        among them, and they are loaded.
        """
        if self.base.pooling == "cls":
            return resident_model(self).initial_head
        width = base_without_weights(self.base, self.num_labels).config.hidden_size
        return {k: v.detach() for k, v in _new_head(width, self).state_dict().items()}

    def unadapted(self, base: PreTrainedModel) -> nn.Module:
        """Return the base model's own head; nothing with mean pooling."""
        return _stock_head(base) if self.base.pooling == "cls" else nn.Identity()


class LoraClassifier(LoraModel):
    """A classifier whose LoRA factors are replaced in place, whatever their ranks."""

    def __init__(self, spec: ClassifierSpec) -> None:
        super().__init__(spec)
        self._pools = spec.base.pooling == "mean"

    def _make_head(self, spec: LoraSpec) -> nn.Module:
        if spec.base.pooling == "cls":
            return _stock_head(self.base)
        return _new_head(self.base.config.hidden_size, spec)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits of shape ``(batch, num_labels)`` from ``(batch, length)`` token ids."""
        output = self.base(input_ids=input_ids, attention_mask=attention_mask)
        if not self._pools:
            logits: Tensor = output.logits
            return logits
        mask = attention_mask.unsqueeze(-1).to(output.last_hidden_state.dtype)
        pooled = (output.last_hidden_state * mask).sum(1) / mask.sum(1).clamp(min=1)
        head: Tensor = self.head_module(pooled)
        return head

    def batch(self, examples: Examples, rows: NDArray[np.int64]) -> Batch:
        """Return padded rows and their classes."""
        return make_batch(examples, rows, self.device)

    def predictions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits ``(rows, num_labels)`` and classes."""
        return self(batch.input_ids, batch.attention_mask), batch.labels

    def num_targets(self, examples: Examples, rows: NDArray[np.int64]) -> int:
        """Count the rows."""
        return len(rows)

    def labels_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Return one label a row."""
        return shape[:1]


def _new_head(width: int, spec: LoraSpec) -> nn.Linear:
    """Return the head for mean pooling; it follows from the seed alone, without the base model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        return nn.Linear(width, spec.num_labels)


def _stock_head(model: PreTrainedModel) -> nn.Module:
    head = getattr(model, "classifier", None)
    if isinstance(head, nn.Module):
        return head
    raise ModelError(f"{type(model).__name__} has no classification head: use model.pooling=mean")


def head_shapes(classifier: LoraModel) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the head's tensors by name."""
    return {k: tuple(v.shape) for k, v in classifier.initial_head.items()}
