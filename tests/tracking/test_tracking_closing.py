from hafl_app.tracking.closing import closing_lines


def test_nothing_is_said_of_what_was_not_asked_for():
    assert closing_lines({"metric": "accuracy"}) == []


def test_seen_unseen_and_generated_answers():
    lines = closing_lines(
        {
            "metric": "perplexity",
            "clients": {
                "seen": {"perplexity": 12.345, "token-accuracy": 0.4567, "loss": 2.5},
                "unseen": {"partitions": [3, 7], "perplexity": 20.0, "token-accuracy": 0.3},
            },
            "generation": {"num_examples": 40, "rouge-l": 0.123, "exact-match": 0.05},
        }
    )
    assert lines == [
        "clients that trained: perplexity 12.35, token accuracy 45.7%",
        "clients that did not (3, 7): perplexity 20.00, token accuracy 30.0%",
        "40 generated answers: Rouge-L 12.3%, exact match 5.0%",
    ]


def test_a_classifiers_scores():
    clients = {"unseen": {"partitions": [1], "accuracy": 0.5, "macro-f1": 0.25}}
    assert closing_lines({"metric": "accuracy", "clients": clients}) == [
        "clients that did not (1): accuracy 50.0%, macro F1 25.0%"
    ]
