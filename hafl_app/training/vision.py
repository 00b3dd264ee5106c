"""An image classifier of transformers with its own head and swappable LoRA factors."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from hafl_app.training.batches import Examples, ImageBatch, ImageExamples
from hafl_app.training.locate import ModelError
from hafl_app.training.lora_model import LoraModel, LoraSpec, resident_model
from hafl_app.training.settings import BaseSpec


@dataclass(frozen=True)
class ImageSpec:
    """Identity of an image classifier's weights before training.

    Parameters
    ----------
    base
        The base model, frozen but for its own classification head, which is trained.
    num_labels
        Classes, at least 2.
    target_modules
        ``all-linear`` for every linear layer but the head, or names (or ends of names) of modules.
    lora_dropout
        Dropout before the trainable factors, in [0, 1).
    seed
        Of all weights that the base model's files do not hold.
    """

    base: BaseSpec
    num_labels: int
    target_modules: str | tuple[str, ...] = "all-linear"
    lora_dropout: float = 0.0
    seed: int = 0

    def build(self) -> "LoraImageClassifier":
        """Return the classifier."""
        return LoraImageClassifier(self)

    def initial_head(self) -> dict[str, Tensor]:
        """Return the head's tensors before training; they are among the base model's weights."""
        return resident_model(self).initial_head

    def unadapted(self, base: PreTrainedModel) -> nn.Module:
        """Return the head."""
        return _head_of(base)


class LoraImageClassifier(LoraModel):
    """An image classifier whose LoRA factors are replaced in place, whatever their ranks."""

    def _make_head(self, spec: LoraSpec) -> nn.Module:
        return _head_of(self.base)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits ``(batch, num_labels)`` of ``(batch, channels, height, width)`` images."""
        logits: Tensor = self.base(pixel_values=pixel_values).logits
        return logits

    def batch(self, examples: Examples, rows: NDArray[np.int64]) -> ImageBatch:
        """Return images and their classes.

        Raises
        ------
        TypeError
            If the examples are no images.
        ModelError
            If the model takes images of another size.
        """
        if not isinstance(examples, ImageExamples):
            raise TypeError(f"the model reads images, {type(examples).__name__} has no pixels")
        self._check_size(examples.pixels.shape[1:])
        pixels, labels = (torch.from_numpy(a[rows]) for a in (examples.pixels, examples.labels))
        return ImageBatch(pixels.to(self.device), labels.to(self.device))

    def predictions(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """Return logits ``(images, num_labels)`` and classes."""
        return self(*batch.inputs), batch.labels

    def num_targets(self, examples: Examples, rows: NDArray[np.int64]) -> int:
        """Count the images."""
        return len(rows)

    def row_length(self, examples: Examples, rows: NDArray[np.int64]) -> int:
        """Return the patches of an image."""
        patch = getattr(self.base.config, "patch_size", 16)
        area = patch**2 if isinstance(patch, int) else math.prod(patch)
        pixels: NDArray[np.float32] = examples.pixels  # type: ignore[attr-defined]
        return max(1, math.prod(pixels.shape[2:]) // area)

    def labels_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Return one label an image."""
        return shape[:1]

    def blank_batch(self, rows: int, length: int) -> ImageBatch:
        """See `LoraModel.blank_batch`."""
        shape = rows, *self._image_shape
        labels = torch.zeros(self.labels_shape((rows, length)), dtype=torch.long)
        return ImageBatch(torch.zeros(shape, device=self.device), labels.to(self.device))

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        config = self.base.config
        side = config.image_size
        height, width = side if isinstance(side, list | tuple) else (side, side)
        return config.num_channels, height, width

    def _check_size(self, shape: tuple[int, ...]) -> None:
        if shape != (expected := self._image_shape):
            raise ModelError(
                f"the images have the shape {shape}, the model takes {expected}: (channels, "
                "height, width), see model.shape"
            )


def _head_of(model: PreTrainedModel) -> nn.Module:
    head = getattr(model, "classifier", None)
    if isinstance(head, nn.Module):
        return head
    raise ModelError(f"{type(model).__name__} has no classifier of its own to train as the head")
