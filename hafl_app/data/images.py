"""Images of one size with their classes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hafl_app.data.errors import DataError
from hafl_app.data.text import EncodedText


@dataclass(frozen=True, eq=False)
class EncodedImages(EncodedText):
    """Images wherever a run has rows of text: rows that have no tokens, but pixels.

    Parameters
    ----------
    pixels
        All images, float32, shape (rows, channels, height, width).
    """

    pixels: npt.NDArray[np.float32] = field(kw_only=True)

    @classmethod
    def of(cls, pixels: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> "EncodedImages":
        """Return images of shape (rows, channels, height, width) with labels of shape (rows,)."""
        offsets = np.zeros(len(labels) + 1, np.int64)
        return cls(np.zeros(0, np.int32), offsets, labels, pixels=pixels)

    def select(self, indices: npt.ArrayLike) -> "EncodedImages":
        """Copy some rows, in the order given; see `EncodedText.select`."""
        rows = np.asarray(indices, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()}, expected 0 to {len(self) - 1}")
        return EncodedImages.of(self.pixels[rows], self.labels[rows])


def encode_images(images: Sequence[Any], labels: npt.ArrayLike) -> EncodedImages:
    """Stack images into one array.

    Parameters
    ----------
    images
        Each nested lists or an array of numbers, all of the same shape (channels, height, width).
    labels
        Class index of each, shape (rows,).

    Raises
    ------
    DataError
        If the images do not have one shape of three sizes, or not one label each.
    """
    classes = np.asarray(labels, dtype=np.int64)
    if classes.shape != (len(images),):
        raise DataError(f"labels of shape {classes.shape} for {len(images)} images")
    try:
        pixels = np.asarray(images, dtype=np.float32)
    except ValueError as error:
        raise DataError("images of different shapes, expected one for all") from error
    if pixels.ndim != 4:
        raise DataError(f"images of shape {pixels.shape[1:]}, expected (channels, height, width)")
    return EncodedImages.of(pixels, classes)
