"""Names and directions of metrics, and what a federation makes of its clients' scores."""

import math

import pytest

from hafl_app.metrics import (
    ACCURACY,
    CAUSAL_LM,
    CLASSIFICATION,
    PERPLEXITY,
    perplexity,
    task_of,
    with_perplexity,
)


def test_more_accuracy_and_less_perplexity_are_better():
    assert ACCURACY.merit(0.7) > ACCURACY.merit(0.6)
    assert PERPLEXITY.merit(20.0) > PERPLEXITY.merit(30.0)
    assert ACCURACY.difference(0.7, 0.6) == pytest.approx(0.1)
    assert PERPLEXITY.difference(20.0, 30.0) == 10.0


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        (ACCURACY, 0.1234, "12.3%"),
        (PERPLEXITY, 34.208, "34.21"),
        (ACCURACY, None, "-"),
        (PERPLEXITY, math.inf, "-"),
    ],
)
def test_values_are_written_by_their_kind(metric, value, text):
    assert metric.text(value) == text


def test_records_say_their_task():
    assert task_of({"validation/loss", "clients/perplexity"}) is CAUSAL_LM
    assert task_of({"test/accuracy", "test/macro-f1"}) is CLASSIFICATION
    assert task_of({"test/token-accuracy"}) is CLASSIFICATION  # no accuracy of tokens is primary
    assert task_of(()) is CLASSIFICATION


class TestOfClients:
    def test_means_are_weighted_by_examples(self):
        clients = [
            {"accuracy": 0.5, "macro-f1": 0.4, "loss": 1.0, "num-examples": 1},
            {"accuracy": 0.9, "macro-f1": 0.8, "loss": 2.0, "num-examples": 3},
        ]

        scores = CLASSIFICATION.of_clients(clients, "num-examples")

        # (0.5 + 3 x 0.9) / 4, (0.4 + 3 x 0.8) / 4 and (1 + 3 x 2) / 4
        assert scores == pytest.approx({"accuracy": 0.8, "macro-f1": 0.7, "loss": 1.75})

    def test_the_perplexity_is_that_of_the_mean_loss(self):
        clients = [
            {"loss": 1.0, "token-accuracy": 0.5, "num-examples": 1},
            {"loss": 3.0, "token-accuracy": 0.1, "num-examples": 3},
        ]

        scores = CAUSAL_LM.of_clients(clients, "num-examples")

        assert scores["perplexity"] == pytest.approx(math.exp(2.5))  # not the mean of exp
        assert scores["token-accuracy"] == pytest.approx(0.2)

    def test_a_client_that_leaves_a_metric_out_makes_it_unknown(self):
        clients = [{"loss": 1.0, "num-examples": 2}]
        assert math.isnan(CAUSAL_LM.of_clients(clients, "num-examples")["token-accuracy"])


def test_perplexity_is_the_exponential_of_the_loss():
    assert perplexity(2.0) == math.exp(2.0)
    assert perplexity(1e4) == math.inf
    assert with_perplexity({"loss": 0.0}) == {"perplexity": 1.0, "loss": 0.0}
