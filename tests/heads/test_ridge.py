"""Ridge regression from sums, beside scikit-learn on the examples themselves."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as DenseRidge
from sklearn.preprocessing import StandardScaler

from hafl_app.heads.feature_sums import FeatureSums
from hafl_app.heads.plausibility import plausible
from hafl_app.heads.ridge import STRENGTHS, Ridge

EXAMPLES, WIDTH, CLASSES = 60, 11, 4


def data(seed: int = 0, *, constant: bool = False):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES - 1, EXAMPLES)  # the last class has no example
    features = rng.normal(size=(CLASSES, WIDTH))[labels] + 2 * rng.normal(size=(EXAMPLES, WIDTH))
    features = features * rng.uniform(0.1, 9, WIDTH) + rng.normal(size=WIDTH)
    if constant:
        features[:, 3] = 7.0
    return features, labels


def sums_of(features, labels) -> FeatureSums:
    return FeatureSums.of(torch.from_numpy(features), torch.from_numpy(labels), CLASSES)


def dense(features, labels, strength):
    """Return the estimates and the effective number of parameters, by the book."""
    scaled = StandardScaler().fit_transform(features)
    targets = np.eye(CLASSES)[labels]
    model = DenseRidge(alpha=strength * len(labels)).fit(scaled, targets)
    gram = scaled.T @ scaled
    inverse = np.linalg.inv(gram + strength * len(labels) * np.eye(WIDTH))
    return model.predict(scaled), 1 + np.trace(gram @ inverse), targets


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
class TestOneStrength:
    def test_it_is_ridge_regression_on_standardized_features(self, strength):
        features, labels = data()
        expected, _, _ = dense(features, labels, strength)
        head = Ridge(sums_of(features, labels)).solve(strength)
        got = head.logits(torch.from_numpy(features)).numpy()
        np.testing.assert_allclose(got, expected, atol=1e-9)

    def test_gcv_is_that_of_the_examples(self, strength):
        features, labels = data()
        estimates, freedom, targets = dense(features, labels, strength)
        residuals = np.sum((targets - estimates) ** 2) / EXAMPLES
        expected = residuals / (1 - freedom / EXAMPLES) ** 2
        got = Ridge(sums_of(features, labels)).gcv(strength)
        assert got == pytest.approx(expected, rel=1e-9)


def test_a_constant_feature_has_no_weight():
    head = Ridge(sums_of(*data(constant=True))).solve(1e-3)
    assert not head.weight[:, 3].any()
    assert head.weight[:, 4].any()


def test_a_class_without_examples_is_never_the_answer():
    features, labels = data()
    logits = Ridge(sums_of(features, labels)).solve(1e-2).logits(torch.from_numpy(features))
    assert (logits.argmax(1) != CLASSES - 1).all()


def test_more_noise_wants_more_strength():
    features, labels = data()
    clean = Ridge(sums_of(features, labels)).best_by_gcv()
    shuffled = np.random.default_rng(1).permutation(labels)
    assert Ridge(sums_of(features, shuffled)).best_by_gcv() > clean


def test_fewer_examples_than_features_still_have_a_strength():
    features, labels = data()
    ridge = Ridge(sums_of(features[:5], labels[:5]))
    assert ridge.best_by_gcv() in STRENGTHS
    assert ridge.solve(STRENGTHS[0]).weight.isfinite().all()


def test_without_moments_it_is_refused():
    features, labels = map(torch.from_numpy, data())
    with pytest.raises(ValueError, match="moments"):
        Ridge(FeatureSums.of(features, labels, CLASSES, moments=False))


def test_a_fit_that_cannot_be_is_not_the_best():
    features, labels = data()
    sums = sums_of(features, labels)
    mean = sums.feature_sum / EXAMPLES
    within = sums.moments - EXAMPLES * torch.outer(mean, mean)
    believed = replace(sums, moments=sums.moments - 0.999 * within)  # less than classes explain
    ridge = Ridge(believed)
    assert ridge.gcv(STRENGTHS[0]) == float("inf")
    assert ridge.gcv(ridge.best_by_gcv()) > 0


def test_one_client_cannot_take_from_what_varies_little():
    # Within what rounding explains, it subtracts in directions where features hardly vary.
    width, most = 40, 4 * 40**0.5
    rng = np.random.default_rng(0)
    turned, _ = np.linalg.qr(rng.normal(size=(width, width)))
    labels = torch.from_numpy(rng.integers(0, CLASSES, 400))
    drawn = rng.normal(size=(400, width)) * np.where(np.arange(width) < 20, 1.0, 0.01)
    drawn[np.arange(400), labels.numpy()] += 3.0
    features = torch.from_numpy(drawn @ turned)
    honest = FeatureSums.of(features, labels, CLASSES)
    moments = torch.zeros(width, width, dtype=torch.float64)
    moments[0, 0] = 200 * most**2
    moments -= 0.9e-6 * 200 * most**2 * torch.eye(width) * (torch.arange(width) > 0)
    counts = torch.full((CLASSES,), 200 / CLASSES, dtype=torch.float64)
    lie = FeatureSums(counts, torch.zeros(width, CLASSES, dtype=torch.float64), moments)

    def accuracy(sums: FeatureSums) -> float:
        ridge = Ridge(sums)
        guesses = ridge.solve(ridge.best_by_gcv()).logits(features).argmax(1)
        return float((guesses == labels).double().mean())

    assert accuracy(honest + plausible(lie, most)) > accuracy(honest) - 0.05
    assert accuracy(honest + lie) < accuracy(honest) - 0.2
