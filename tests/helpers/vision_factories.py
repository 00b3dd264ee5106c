"""Fixtures of the tests of image classifiers: a tiny vision transformer and noisy images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hafl_app.training.settings import BaseSpec
from hafl_app.training.vision import ImageSpec

LABELS = 3
SIZE = (2, 4, 6)  # channels, height, width: no two the same
SHAPE = {
    "model_type": "vit",
    "image_size": [4, 6],
    "patch_size": 2,
    "num_channels": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
IMAGES = BaseSpec("", random_weights=True, pooling="cls", task="image_classification", shape=SHAPE)
SPEC = ImageSpec(IMAGES, LABELS, seed=7)


@dataclass(frozen=True)
class Images:
    """Labeled images of one size."""

    pixels: NDArray[np.float32]
    labels: NDArray[np.int64]

    @property
    def offsets(self) -> NDArray[np.int64]:
        return np.zeros(len(self.labels) + 1, np.int64)


def random_images(number: int, seed: int = 0) -> Images:
    """Return noise; the class can be told from a channel's mean in the left or the right half."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(LABELS, number, p=[0.5, 0.3, 0.2])
    pixels = rng.normal(size=(number, *SIZE)).astype(np.float32)
    for label, place in enumerate([np.s_[0, :, :3], np.s_[1, :, 3:], np.s_[0, :, 3:]]):
        pixels[(labels == label, *place)] += 2
    return Images(pixels, labels)
