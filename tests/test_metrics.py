"""Names and directions of metrics, and what a federation makes of its clients' scores."""

import math

import pytest

from hafl_app.metrics import (
    ACCURACY,
    CAUSAL_LM,
    CLASSIFICATION,
    MACRO_F1,
    PERPLEXITY,
    Choice,
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


class TestChoice:
    """Of which round is the best: the issue's case had 13.7 % macro F1 in round 1, 20.6 % in 3."""

    ROUNDS = (
        {"validation/accuracy": 0.6, "validation/macro-f1": 0.137, "validation/loss": 1.5},
        {"validation/accuracy": 0.55, "validation/macro-f1": 0.15, "validation/loss": 1.4},
        {"validation/accuracy": 0.575, "validation/macro-f1": 0.206, "validation/loss": 1.3},
    )

    def best(self, choice, rounds=ROUNDS):
        return max(range(len(rounds)), key=lambda i: choice.merit(rounds[i])) + 1

    def test_unbalanced_classes_are_chosen_by_macro_f1(self):
        choice = Choice.by_validation(CLASSIFICATION, [24, 10, 3, 3], 4)

        assert (choice.metric, choice.largest_share) == (MACRO_F1, 0.6)
        assert self.best(choice) == 3

    def test_balanced_ones_by_accuracy(self):
        choice = Choice.by_validation(CLASSIFICATION, [12, 10, 9, 9], 4)

        assert choice.metric == ACCURACY
        assert self.best(choice) == 1

    @pytest.mark.parametrize(("largest", "metric"), [(15, ACCURACY), (16, MACRO_F1)])
    def test_the_border_is_one_and_a_half_times_a_balanced_share(self, largest, metric):
        sizes = [largest, 9, 8, 40 - largest - 17]
        assert Choice.by_validation(CLASSIFICATION, sizes, 4).metric == metric

    def test_of_equal_scores_the_lower_loss_wins(self):
        equal = [{**r, "validation/accuracy": 0.6} for r in self.ROUNDS]
        choice = Choice.by_validation(CLASSIFICATION, [10, 10], 2)

        assert self.best(choice, equal) == 3

    def test_clients_are_asked_for_macro_f1(self):
        assert Choice.by_clients(CLASSIFICATION).key == "clients/macro-f1"
        assert Choice.by_clients(CAUSAL_LM).key == "clients/perplexity"

    def test_a_language_model_by_its_perplexity_however_its_categories_are(self):
        assert Choice.by_validation(CAUSAL_LM, [39, 1], 2).metric == PERPLEXITY

    def test_an_unknown_score_is_never_the_best(self):
        choice = Choice.by_validation(CLASSIFICATION, [10, 10], 2)
        assert choice.merit({}) < choice.merit({"validation/accuracy": 0.0})
