"""Sums that no examples can have are found out."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hafl_app.heads.feature_sums import FeatureSums, limit_norm
from hafl_app.heads.plausibility import ImplausibleSumsError, plausible

WIDTH, CLASSES, MOST = 9, 4, 3.0


def sums(seed: int = 0, examples: int = 30, *, moments: bool = True) -> FeatureSums:
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.normal(size=(examples, WIDTH)) + 2 * rng.normal(size=WIDTH))
    labels = torch.from_numpy(rng.integers(0, CLASSES - 1, examples))
    return FeatureSums.of(limit_norm(features, MOST), labels, CLASSES, moments=moments)


def rounded(exact: FeatureSums) -> FeatureSums:
    moments = None if exact.moments is None else exact.moments.float().double()
    return FeatureSums(exact.class_counts, exact.class_sums.float().double(), moments)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), examples=st.integers(1, 40), moments=st.booleans())
def test_those_of_examples_are_accepted_also_rounded(seed, examples, moments):
    exact = sums(seed, examples, moments=moments)
    for stated in (exact, rounded(exact)):
        accepted = plausible(stated, MOST)
        assert torch.equal(accepted.class_sums, stated.class_sums)
        if moments:
            trace = float(stated.moments.trace())
            assert torch.allclose(accepted.moments, stated.moments, rtol=0, atol=1e-6 * trace)


def changed(name: str, change) -> FeatureSums:
    whole = sums()
    tensor = getattr(whole, name).clone()
    change(tensor)
    return replace(whole, **{name: tensor})


def set_to(index, value):
    def change(tensor):
        tensor[index] = value

    return change


LIES = [
    ("class_counts", set_to(0, -1.0), "class counts of -1.0, expected whole numbers from 0"),
    ("class_counts", set_to(1, 2.5), "class counts of 2.5"),
    ("class_sums", set_to((2, 1), float("nan")), "sums by class: 1 numbers are not finite"),
    ("moments", set_to((0, 0), float("inf")), "moments: 1 numbers are not finite"),
    # a class without an example, and one of longer features than any example has
    ("class_sums", set_to((0, CLASSES - 1), 0.5), "class 3: the features of 0 examples add up to"),
    ("class_sums", lambda t: t.mul_(50), "expected at most 3 for each"),
    ("moments", lambda t: t.mul_(50), "moments: a trace of"),
    ("moments", lambda t: t.mul_(-1), "moments: a trace of"),
    # moments that are not those of the same examples as the sums by class
    ("moments", lambda t: t.mul_(0.1), "they do not fit the sums by class"),
    ("moments", set_to((0, 0), -0.1), "not positive semidefinite"),
    ("class_counts", set_to(0, 1.0), "class 0"),
]


@pytest.mark.parametrize(("name", "change", "reason"), LIES)
def test_a_lie_is_named(name, change, reason):
    with pytest.raises(ImplausibleSumsError, match=re.escape(reason)):
        plausible(changed(name, change), MOST)


def test_a_symmetric_matrix_with_a_negative_direction_is_found():
    whole = sums()
    direction = torch.linalg.eigh(whole.moments).eigenvectors[:, 0]
    bent = replace(whole, moments=whole.moments - 4 * torch.outer(direction, direction))
    with pytest.raises(ImplausibleSumsError, match="positive semidefinite"):
        plausible(bent, MOST)


def test_more_examples_than_the_trace_explains_are_no_lie():
    # Features may be short; what bounds a claim of examples is the operator's limit.
    whole = sums()
    plausible(replace(whole, class_counts=10 * whole.class_counts), MOST)


def test_what_rounding_would_excuse_takes_nothing_from_others():
    # All of its trace in one feature, and in the others as much below 0 as rounding might explain.
    counts = torch.tensor([20.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    moments = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    moments[0, 0] = 20 * MOST**2
    taken = 0.9e-6 * float(moments.trace())
    moments -= taken * torch.eye(WIDTH, dtype=torch.float64) * (torch.arange(WIDTH) > 0)
    lie = FeatureSums(counts, torch.zeros(WIDTH, CLASSES, dtype=torch.float64), moments)

    added = plausible(lie, MOST).moments

    assert float(torch.linalg.eigvalsh(added).min()) > -1e-6 * taken
    assert torch.allclose(added[0], moments[0])
