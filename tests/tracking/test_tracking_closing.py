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


def test_categories_clients_and_their_answers():
    its = {"rouge-l": 0.25, "exact-match": 0.125}
    lines = closing_lines(
        {
            "metric": "perplexity",
            "categories": {"qa": {"perplexity": 9.0}, "chat": {"perplexity": 30.0}},
            "client_scores": {"clients": 12, "perplexity": {"mean": 11.0, "worst_tenth": 19.0}},
            "client_generation": {
                "seen": {
                    **its,
                    "worst_tenth": {**its, "rouge-l": 0.0},
                    "clients": 8,
                    "num_examples": 64,
                }
            },
            "watched": {"prompts": 3},
        }
    )
    assert lines == [
        "test perplexity of 2 categories: 9.00 (qa) to 30.00 (chat)",
        "12 clients' perplexity: mean 11.00, worst tenth 19.00",
        "64 answers of 8 seen clients: Rouge-L 25.0% (worst tenth 0.0%), exact match 12.5% "
        "(worst tenth 12.5%)",
        "answers to 3 prompts, round by round: answers.md",
    ]


def test_a_classifiers_scores():
    clients = {"unseen": {"partitions": [1], "accuracy": 0.5, "macro-f1": 0.25}}
    assert closing_lines({"metric": "accuracy", "clients": clients}) == [
        "clients that did not (1): accuracy 50.0%, macro F1 25.0%"
    ]
