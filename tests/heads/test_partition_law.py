"""The head does not depend on who has which examples, nor on order and number of the clients."""

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from hafl_app.heads.feature_sums import FeatureSums
from hafl_app.heads.plausibility import plausible
from hafl_app.heads.solve import solve
from hafl_app.wire.feature_sums import SUMS, SumsFormat, read_sums, write_sums

EXAMPLES, WIDTH, CLASSES = 211, 13, 5
STRENGTH = 1e-3
MOST = 100.0  # L2 norm of no example's features


def features_and_labels(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features as an encoder has them: correlated, and far from 0 beside their spread."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, EXAMPLES)
    mixing = rng.normal(size=(WIDTH, WIDTH))
    features = (rng.normal(size=(CLASSES, WIDTH))[labels] + rng.normal(size=(EXAMPLES, WIDTH))) @ (
        0.3 * mixing
    ) + 4 * rng.normal(size=WIDTH)
    return torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels)


def uploaded(sums: FeatureSums, numbers: str) -> FeatureSums:
    """Return sums as the server reads and accepts them."""
    content = RecordDict({SUMS: write_sums(sums, numbers)})
    read = read_sums(content, SumsFormat(WIDTH, CLASSES, sums.moments is not None, numbers))
    return plausible(read, MOST)


def total(parts: list[np.ndarray], seed: int, numbers: str, rule: str) -> FeatureSums:
    features, labels = features_and_labels(seed)
    whole = FeatureSums.zeros(WIDTH, CLASSES, moments=rule == "ridge")
    for rows in parts:
        sums = FeatureSums.of(features[rows], labels[rows], CLASSES, moments=rule == "ridge")
        whole += uploaded(sums, numbers)
    return whole


@st.composite
def partitions(draw):
    """Draw clients with unequal shares in any order, some of them with one example or one class."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    by_class = draw(st.booleans())
    order = rng.permutation(EXAMPLES)
    seed = draw(st.integers(0, 2**16))
    if by_class:
        order = np.argsort(features_and_labels(seed)[1].numpy(), kind="stable")
    cuts = np.sort(rng.choice(np.arange(1, EXAMPLES), draw(st.integers(0, 40)), replace=False))
    parts = np.split(order, cuts)
    return seed, [parts[i] for i in rng.permutation(len(parts))]


@pytest.mark.parametrize("rule", ["ridge", "class_means"])
class TestEveryPartition:
    @settings(deadline=None, max_examples=40)
    @given(drawn=partitions())
    def test_float64_uploads_give_the_centralized_solution(self, rule, drawn):
        seed, parts = drawn
        features, labels = features_and_labels(seed)
        central = FeatureSums.of(features, labels, CLASSES, moments=rule == "ridge")
        expected = solve(central, rule=rule, strength=STRENGTH).head

        got = solve(total(parts, seed, "fp64", rule), rule=rule, strength=STRENGTH).head

        scale = float(expected.weight.abs().max())
        assert float((got.weight - expected.weight).abs().max()) < 1e-6 * scale
        assert float((got.bias - expected.bias).abs().max()) < 1e-6 * max(1.0, scale)

    @settings(deadline=None, max_examples=40)
    @given(drawn=partitions())
    def test_float32_uploads_give_the_centralized_predictions(self, rule, drawn):
        seed, parts = drawn
        features, labels = features_and_labels(seed)
        central = FeatureSums.of(features, labels, CLASSES, moments=rule == "ridge")
        expected = solve(central, rule=rule, strength=STRENGTH).head.logits(features)

        got = solve(total(parts, seed, "fp32", rule), rule=rule, strength=STRENGTH).head

        assert float((got.logits(features) - expected).abs().max()) < 1e-3

    def test_a_client_left_out_changes_it(self, rule):
        parts = np.array_split(np.arange(EXAMPLES), 7)
        whole = solve(total(parts, 0, "fp64", rule), rule=rule, strength=STRENGTH).head
        less = solve(total(parts[1:], 0, "fp64", rule), rule=rule, strength=STRENGTH).head
        assert float((whole.weight - less.weight).abs().max()) > 1e-3
