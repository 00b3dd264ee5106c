"""By what a run chooses its best round, and that it says so, on how many rows."""

import json

import pytest
from running import records, run_tiny

from hafl_app.metrics import MACRO_F1, Choice
from hafl_app.reports.curve import read_curve
from hafl_app.tracking.closing import closing_lines

WORDS = {"weather": "rain cloud storm", "music": "song drum choir", "food": "bread soup apple"}


def data(path, **rows):
    """Write a file of so many rows of each class, and return the settings that read it."""
    lines = [
        {"text": f"{i} {WORDS[name]}", "label": name}
        for name, count in rows.items()
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return (
        "dataset=local",
        f"dataset.path={path}",
        "dataset.validation_fraction=0.25",
        "federation.num_rounds=4",
        "client.learning_rate=0.05",
    )


@pytest.mark.slow
class TestARun:
    def test_unbalanced_classes_are_chosen_by_macro_f1_and_the_run_says_so(self, tmp_path, capsys):
        overrides = data(tmp_path / "a.jsonl", weather=140, music=30, food=10)

        summary = run_tiny(tmp_path / "out", *overrides)

        entry = summary["best_validation"]
        scores = [r["metrics"] for r in records(tmp_path / "out", "round")[1:]]
        choice = Choice(MACRO_F1, "validation")
        best = max(range(len(scores)), key=lambda i: choice.merit(scores[i]))
        assert entry["round"] == best + 1
        assert entry["chosen_by"] == "macro-f1"
        assert entry["largest_class"] > 0.7
        assert entry["rows"] > 20
        said = f"best round {best + 1}: chosen by macro F1 on {entry['rows']} validation rows"
        assert said in capsys.readouterr().out
        assert read_curve(tmp_path / "out").best_round == best + 1

    def test_balanced_ones_by_accuracy(self, tmp_path):
        overrides = data(tmp_path / "a.jsonl", weather=50, music=40, food=50)

        assert run_tiny(tmp_path / "out", *overrides)["best_validation"]["chosen_by"] == "accuracy"

    def test_a_resumed_run_chooses_as_one_that_was_never_stopped(self, tmp_path):
        overrides = data(tmp_path / "a.jsonl", weather=140, music=30, food=10)
        whole = run_tiny(tmp_path / "whole", *overrides)
        run_tiny(tmp_path / "parts", *overrides, "federation.num_rounds=2")
        parts = run_tiny(tmp_path / "parts", *overrides, f"resume={tmp_path / 'parts'}")

        assert parts["best_validation"] == whole["best_validation"]


def test_the_line_says_metric_rows_and_the_largest_class():
    entry = {"round": 3, "chosen_by": "macro-f1", "rows": 40, "largest_class": 0.6}

    assert closing_lines({"best_validation": entry}) == [
        "best round 3: chosen by macro F1 on 40 validation rows, the largest class 60.0% of them"
    ]
    assert closing_lines({"best_clients": {**entry, "largest_class": None}}) == [
        "best round 3: chosen by macro F1 on 40 rows of the clients"
    ]
