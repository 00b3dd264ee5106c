"""Macro F1 beside scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from hafl_app.training.macro_f1 import macro_f1


@pytest.mark.parametrize("seed", range(5))
def test_it_equals_scikit_learns_also_for_classes_that_are_never_right_or_never_seen(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 7, 40)
    labels[labels == 3] = 4  # a class in neither
    predicted = np.where(rng.random(40) < 0.5, labels, rng.choice([0, 1, 9], 40))

    expected = f1_score(labels, predicted, average="macro", zero_division=0)

    assert macro_f1(labels, predicted) == pytest.approx(expected, rel=1e-12)


def test_without_a_right_row_it_is_zero():
    assert macro_f1(np.array([0, 0]), np.array([2, 1])) == 0
