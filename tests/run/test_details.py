"""Details that a run records for its figures: clients' scores and importance, round by round."""

import json
import math

import pytest
from running import records, run_tiny

from hafl_app.tracking.details import DETAILS_FILE

EVALUATED = ("federation.fraction_evaluate=1", "dataset.holdout_fraction=0.2")


def details(folder, kind):
    lines = map(json.loads, (folder / DETAILS_FILE).read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize(
    ("strategy", "measure"), [("hafl", "smoothed"), ("flexlora", "norm")], ids=str
)
def test_scores_and_importance_of_every_round(tmp_path, strategy, measure):
    run_tiny(tmp_path, f"strategy={strategy}", *EVALUATED)
    for of_round in records(tmp_path, "round")[1:]:
        number = of_round["server_round"]
        scored = [s for s in details(tmp_path, "scores") if s["server_round"] == number]
        assert [one["partition_id"] for one in scored] == [0, 1, 2, 3, 4]
        assert len({one["num_examples"] for one in scored}) >= 1
        total = sum(one["num_examples"] for one in scored)
        mean = sum(one["num_examples"] * one["metrics"]["loss"] for one in scored) / total
        assert mean == pytest.approx(of_round["metrics"]["clients/loss"])
    measured = details(tmp_path, "importance")
    assert [one["server_round"] for one in measured] == [1, 2]  # not before training
    assert {one["measure"] for one in measured} == {measure}
    values = [v for one in measured for scores in one["modules"].values() for v in scores]
    assert any(values)
    assert all(v is None or (math.isfinite(v) and v >= 0) for v in values)


def test_without_scoring_clients_there_is_importance_alone(tmp_path):
    run_tiny(tmp_path, "strategy=flexlora", "federation.fraction_evaluate=0")
    assert details(tmp_path, "scores") == []
    assert len(details(tmp_path, "importance")) == 2
