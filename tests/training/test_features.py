"""Features of a classifier are those of its evaluation; sums are those of the examples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from training_factories import LABELS, SPEC, random_adapter, random_rows
from vision_factories import SPEC as IMAGE_SPEC
from vision_factories import random_images

from hafl_app.heads.projection import random_projection
from hafl_app.heads.settings import ClosedFormSettings
from hafl_app.training.evaluate import evaluate, predict_logits, temperature_losses
from hafl_app.training.features import features_of, sums_of
from hafl_app.training.locate import ModelError

ROWS = random_rows(37)
WIDE = ClosedFormSettings(feature_limit=100.0)  # none of these features is shortened
WIDTH = 32


def with_dropout(spec):
    """Return a spec whose base model drops out while it trains."""
    return replace(spec, base=replace(spec.base, dropout=True))


@pytest.fixture(
    scope="module", params=["mean", "cls", "images"], ids=["mean pooling", "own head", "images"]
)
def loaded(request):
    """Return a model with an adapter that matters, in training mode, and examples."""
    pooling, images = request.param, request.param == "images"
    spec = IMAGE_SPEC if images else SPEC
    if pooling == "cls":
        spec = replace(spec, base=replace(spec.base, pooling="cls"))
    model = with_dropout(spec).build()
    model.load_whole(random_adapter(model, 3, seed=1))
    model.train()
    return model, random_images(23) if images else ROWS


def features(model, examples, settings=WIDE, **changes):
    return features_of(model, examples, settings, **{"precision": "fp32", "seed": 0, **changes})


def sums(model, examples, settings=WIDE):
    return sums_of(model, examples, settings, precision="fp32", seed=0)


class TestFeatures:
    def test_the_head_makes_the_logits_of_evaluation_from_them(self, loaded):
        model, examples = loaded
        found = features(model, examples)
        head = {k: v.double() for k, v in model.head_state().items()}
        logits = found @ head["weight"].T + head["bias"]
        expected = predict_logits(model, examples, "fp32")
        np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4)

    def test_nothing_drops_out(self, loaded):
        model, examples = loaded
        model.train()
        first = features(model, examples)
        model.train()
        assert torch.equal(first, features(model, examples))

    def test_the_model_reads_on_as_before(self, loaded):
        model, examples = loaded
        before = evaluate(model, examples, "fp32")
        features(model, examples)
        assert evaluate(model, examples, "fp32") == before


class TestSums:
    def test_they_are_those_of_the_examples(self, loaded):
        model, examples = loaded
        x, y = features(model, examples), torch.eye(LABELS).double()[examples.labels]
        found = sums(model, examples)
        counts = np.bincount(examples.labels, minlength=LABELS)
        assert found.class_counts.tolist() == counts.tolist()
        assert found.moments.dtype == torch.float64
        assert torch.allclose(found.moments, x.T @ x, rtol=1e-12)
        assert torch.allclose(found.class_sums, x.T @ y, rtol=1e-12, atol=1e-12)

    def test_class_means_need_no_moments(self, loaded):
        found = sums(*loaded, settings=replace(WIDE, rule="class_means"))
        assert found.moments is None
        assert torch.equal(found.class_sums, sums(*loaded).class_sums)


@pytest.fixture(scope="module")
def tiny():
    model = SPEC.build()
    model.load_whole(random_adapter(model, 2, seed=3))
    return model


class TestBounds:
    def test_long_features_count_as_much_as_the_limit(self, tiny):
        limit = 0.5 * float(features(tiny, ROWS).norm(dim=1).max()) / WIDTH**0.5
        settings = replace(WIDE, feature_limit=limit)
        norms = features(tiny, ROWS, settings).norm(dim=1)
        assert float(norms.max()) == pytest.approx(settings.most_norm(WIDTH))
        trace = float(sums(tiny, ROWS, settings).moments.trace())
        assert trace <= (1 + 1e-12) * 37 * settings.most_norm(WIDTH) ** 2

    def test_a_projection_leaves_fewer_features(self, tiny):
        settings = replace(WIDE, projection=6)
        found = features(tiny, ROWS, settings, seed=5)
        expected = features(tiny, ROWS) @ random_projection(WIDTH, 6, 5)
        assert torch.allclose(found, expected)
        assert sums(tiny, ROWS, settings).moments.shape == (6, 6)

    def test_a_projection_that_leaves_them_all_is_none(self, tiny):
        settings = replace(WIDE, projection=WIDTH)
        assert torch.equal(features(tiny, ROWS, settings), features(tiny, ROWS))


def test_losses_by_temperature_are_those_of_divided_logits(tiny):
    losses = temperature_losses(tiny, ROWS, "fp32")
    at_one = 37 * evaluate(tiny, ROWS, "fp32").loss
    assert float(losses[4]) == pytest.approx(at_one, rel=1e-5)  # the fifth temperature is 1


def test_a_head_without_an_output_layer_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "head_module", torch.nn.Identity())
    with pytest.raises(ModelError, match=r"model\.head=closed_form: the head has no linear layer"):
        sums(tiny, ROWS)
