"""Class means, temperature, projection, and the place of the head among a model's tensors."""

import numpy as np
import pytest
import torch

from hafl_app.heads.class_means import nearest_class_mean
from hafl_app.heads.feature_sums import (
    FeatureSums,
    limit_norm,
    symmetric,
    triangle_size,
    upper_triangle,
)
from hafl_app.heads.linear_head import (
    LinearHead,
    feature_width,
    output_layer,
    with_output_layer,
)
from hafl_app.heads.projection import random_projection
from hafl_app.heads.solve import ValidationFeatures, bounded_losses, solve
from hafl_app.heads.temperature import TEMPERATURES, best_temperature, losses_by_temperature

WIDTH, CLASSES = 7, 4


def clusters(examples: int = 80, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES - 1, examples)  # the last class has no example
    features = 5 + 3 * rng.normal(size=(CLASSES, WIDTH))[labels]
    return torch.from_numpy(features + rng.normal(size=(examples, WIDTH))), torch.from_numpy(labels)


class TestSums:
    def test_the_triangle_is_the_matrix(self):
        moments = FeatureSums.of(*clusters(), CLASSES).moments
        flat = upper_triangle(moments)
        assert len(flat) == triangle_size(WIDTH)
        assert torch.allclose(symmetric(flat, WIDTH), moments, rtol=1e-14)

    def test_examples_may_count_for_less(self):
        sums = FeatureSums.of(*clusters(), CLASSES).scaled(0.25)
        assert sums.num_examples == 20
        assert torch.allclose(sums.feature_sum, 0.25 * clusters()[0].sum(0))

    def test_only_long_features_are_shortened(self):
        features = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)
        limited = limit_norm(features, 1.0)
        assert torch.allclose(limited[0], torch.tensor([0.6, 0.8], dtype=torch.float64))
        assert torch.equal(limited[1:], features[1:])


class TestClassMeans:
    def test_it_is_the_largest_cosine_of_centered_means(self):
        features, labels = clusters()
        head = nearest_class_mean(FeatureSums.of(features, labels, CLASSES, moments=False))
        mean = features.mean(0)
        means = torch.stack([features[labels == c].mean(0) for c in range(CLASSES - 1)])
        cosines = torch.nn.functional.cosine_similarity(
            (features - mean)[:, None], (means - mean)[None], dim=2
        )
        assert torch.equal(head.logits(features).argmax(1), cosines.argmax(1))

    def test_a_class_without_examples_is_never_the_answer(self):
        features, labels = clusters()
        head = nearest_class_mean(FeatureSums.of(features, labels, CLASSES, moments=False))
        assert (head.logits(features).argmax(1) != CLASSES - 1).all()


class TestTemperature:
    def test_what_minimizes_cross_entropy_is_found(self):
        generator = torch.Generator().manual_seed(0)
        logits = 3 * torch.randn(4000, CLASSES, generator=generator)
        labels = torch.distributions.Categorical(logits=logits).sample()
        # Logits of a ridge regression are small: the head's are to be divided by less than 1.
        chosen = best_temperature(losses_by_temperature(logits / 32, labels))
        assert chosen == pytest.approx(1 / 32, rel=0.5)

    def test_one_client_cannot_state_any_loss(self):
        losses = torch.full((len(TEMPERATURES),), 1e9, dtype=torch.float64)
        most = float(bounded_losses(losses, 8, CLASSES).max())
        assert most == pytest.approx(80 * np.log(CLASSES))


class TestStrengthByValidation:
    def test_validation_chooses_what_is_best_on_it(self):
        features, labels = clusters(24, seed=3)
        noise = labels[torch.randperm(24, generator=torch.Generator().manual_seed(1))]
        sums = FeatureSums.of(features, labels, CLASSES)
        fits = solve(sums, rule="ridge", validation=ValidationFeatures(features, labels))
        shrinks = solve(sums, rule="ridge", validation=ValidationFeatures(features, noise))
        assert fits.strength < shrinks.strength


class TestProjection:
    def test_norms_are_kept_on_average(self):
        projection = random_projection(300, 60, 5)
        features = torch.randn(200, 300, dtype=torch.float64)
        ratio = (features @ projection).norm(dim=1) / features.norm(dim=1)
        assert float(ratio.mean()) == pytest.approx(1.0, abs=0.05)

    def test_it_follows_from_the_seed(self):
        assert torch.equal(random_projection(9, 4, 1), random_projection(9, 4, 1).clone())
        assert not torch.equal(random_projection(9, 4, 1), random_projection(9, 4, 2))

    def test_the_head_takes_whole_features(self):
        features, labels = clusters()
        projection = random_projection(WIDTH, 3, 0)
        head = solve(
            FeatureSums.of(features @ projection, labels, CLASSES), rule="ridge", strength=1e-2
        ).head
        whole = head.unprojected(projection)
        assert whole.weight.shape == (CLASSES, WIDTH)
        assert torch.allclose(whole.logits(features), head.logits(features @ projection))


STOCK = {
    "dense.weight": torch.zeros(WIDTH, WIDTH),
    "dense.bias": torch.zeros(WIDTH),
    "out_proj.weight": torch.zeros(CLASSES, WIDTH),
    "out_proj.bias": torch.zeros(CLASSES),
}


class TestPlace:
    def test_the_output_layer_of_a_stock_head(self):
        assert output_layer(STOCK, CLASSES) == "out_proj"
        assert output_layer(dict(reversed(STOCK.items())), CLASSES) == "out_proj"
        assert feature_width(STOCK, CLASSES) == WIDTH

    def test_a_linear_layer_is_its_own(self):
        head = {"weight": torch.zeros(CLASSES, WIDTH), "bias": torch.zeros(CLASSES)}
        assert output_layer(head, CLASSES) == ""

    def test_nothing_else_of_the_head_changes(self):
        solved = LinearHead(torch.ones(CLASSES, WIDTH).double(), torch.ones(CLASSES).double())
        head = with_output_layer(STOCK, solved)
        assert list(head) == list(STOCK)
        assert head["out_proj.weight"].dtype == torch.float32
        assert head["out_proj.weight"].all()
        assert not head["dense.weight"].any()

    def test_a_head_without_a_bias_is_refused(self):
        with pytest.raises(ValueError, match="no linear layer with a bias and 4 outputs"):
            output_layer({"weight": torch.zeros(CLASSES, WIDTH)}, CLASSES)

    def test_numbers_that_are_not_finite_are_refused(self):
        solved = LinearHead(torch.full((CLASSES, WIDTH), torch.nan), torch.zeros(CLASSES))
        with pytest.raises(ValueError, match="not finite"):
            with_output_layer(STOCK, solved)
