"""Handwritten digits that come with scikit-learn: nothing is downloaded."""

from typing import Final

import pandas as pd
from sklearn.datasets import load_digits

_BRIGHTEST: Final = 16.0


def read_digits() -> pd.DataFrame:
    """Return the 1,797 digits of 8 x 8 pixels in 17 shades of gray.

    The test part of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI
    Machine Learning Repository, 1998, doi:10.24432/C50P49, CC BY 4.0.

    Returns
    -------
    DataFrame
        ``pixels``: each image as nested lists of shape (1, 8, 8), from -1 to 1, as the image
        processors of vision transformers leave them. ``label``: ``"0"`` to ``"9"``.
    """
    digits = load_digits()
    images = digits.images[:, None] * (2 / _BRIGHTEST) - 1
    return pd.DataFrame({"pixels": images.tolist(), "label": digits.target.astype(str)})
