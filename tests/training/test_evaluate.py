from contextlib import nullcontext

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss
from torch import nn
from training_factories import CPU, LABELS, SPEC, random_adapter, random_rows, rows_of

from hafl_app.training.batches import make_batch
from hafl_app.training.classifier import LoraClassifier
from hafl_app.training.evaluate import (
    ClassificationScores,
    adapter_evaluator,
    evaluate,
    predict_logits,
)


class Lookup(nn.Module):
    """A classifier whose logits are row ``n`` of a table if a text starts with token ``n``."""

    device = CPU

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.logits = torch.tensor(logits, dtype=torch.float32)

    def batch(self, examples, rows):
        return make_batch(examples, rows, self.device)

    def computing(self, precision):
        return nullcontext()

    def forward(self, input_ids, attention_mask):
        assert not self.training
        return self.logits[input_ids[:, 0]]


def numbered_rows(number: int):
    """Return rows that start with their own number, of lengths in disorder, labels unequal."""
    rng = np.random.default_rng(3)
    sequences = [[i, *[1] * rng.integers(0, 6)] for i in range(number)]
    return rows_of(sequences, rng.choice(LABELS, number, p=[0.6, 0.3, 0.1]).tolist())


def test_logits_keep_the_order_of_the_rows():
    table = np.random.default_rng(0).normal(size=(300, LABELS)).astype(np.float32)

    logits = predict_logits(Lookup(table), numbered_rows(300))  # three batches

    np.testing.assert_array_equal(logits, table)


def test_scores_are_scikit_learns():
    rows = numbered_rows(300)
    logits = np.random.default_rng(1).normal(size=(300, LABELS))
    logits[np.arange(300), rows.labels] += 1  # better than chance
    predicted = logits.argmax(1)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)

    scores = evaluate(Lookup(logits), rows)

    assert scores.num_examples == 300
    assert scores.accuracy == pytest.approx(accuracy_score(rows.labels, predicted))
    assert scores.macro_f1 == pytest.approx(f1_score(rows.labels, predicted, average="macro"))
    assert scores.loss == pytest.approx(log_loss(rows.labels, probabilities), rel=1e-5)
    assert scores.macro_f1 != pytest.approx(scores.accuracy, abs=0.01)  # told apart


def test_a_class_that_is_never_predicted_counts_as_zero():
    # classes 0, 0, 1, all said to be 0: F1 of 0 is 2 * (2/3) / (5/3) = 0.8, of 1 is 0
    rows = rows_of([[0], [1], [2]], [0, 0, 1])

    scores = evaluate(Lookup(np.tile([1.0, 0.0, 0.0], (3, 1))), rows)

    assert scores.accuracy == pytest.approx(2 / 3)
    assert scores.macro_f1 == pytest.approx(0.4)


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no example"):
        evaluate(Lookup(np.zeros((1, LABELS))), rows_of([], []))


def test_metrics_are_named_by_phase():
    assert ClassificationScores(0.5, 0.25, 2.0, 4).named("test") == {
        "test/accuracy": 0.5,
        "test/macro-f1": 0.25,
        "test/loss": 2.0,
    }


def test_adapters_are_scored_one_after_another():
    classifier, rows = LoraClassifier(SPEC), random_rows(20)
    adapters = [random_adapter(classifier, rank, seed=rank) for rank in (2, 5)]
    score = adapter_evaluator(classifier)

    first, second = (score(adapter, rows) for adapter in adapters)

    assert first.loss != second.loss
    assert score(adapters[0], rows) == first
    classifier.load_whole(adapters[1])
    assert evaluate(classifier, rows) == second
