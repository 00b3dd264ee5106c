"""Figures: well-formed SVG that shows what was recorded, and no text of others as markup."""

from xml.etree import ElementTree as ET

import pytest
from run_folders import HOSTILE, client_record, round_record

from hafl_app.dashboard.charts import QUANTITIES, client_heat_map, curves, importance_heat_map
from hafl_app.dashboard.records import Importance
from hafl_app.dashboard.runs import Run

NAN = float("nan")
ROUNDS = [round_record(r) for r in range(4)]
TRAININGS = [client_record(r, c) for r in (1, 2) for c in range(3)]


def texts(svg):
    return [node.text or "" for node in ET.fromstring(svg).iter() if node.tag.endswith("}text")]


def test_the_curves_of_several_runs_are_in_one_figure():
    runs = {name: Run(name, "finished", rounds=ROUNDS) for name in ("one", "day/two", "_three")}
    drawn = texts(curves(runs, "validation"))
    assert {"one", "day/two", "./_three"} <= set(drawn)
    assert {"round", "sent so far, down and up (MB)", "validation accuracy"} <= set(drawn)


def test_runs_of_another_metric_are_left_out():
    loss = [round_record(r, metrics={"test/perplexity": 3.0}) for r in range(3)]
    runs = {
        "accuracy": Run("accuracy", "finished", rounds=ROUNDS),
        "perplexity": Run("perplexity", "finished", rounds=loss),
    }
    drawn = texts(curves(runs, "validation"))
    assert "accuracy" in drawn
    assert "perplexity" not in drawn


@pytest.mark.parametrize("rounds", [[], [round_record(0, metrics={})], ROUNDS[:1]])
def test_a_run_with_little_or_nothing_is_drawn(rounds):
    assert texts(curves({"run": Run("run", "running", rounds=rounds)}, "test"))


def test_a_name_is_never_markup_nor_a_formula():
    name = f"{HOSTILE}$x^2$"
    svg = curves({name: Run(name, "finished", rounds=ROUNDS)}, "validation")
    assert not [n for n in ET.fromstring(svg).iter() if n.tag.endswith(("script", "image", "img"))]
    assert any("onerror" in text and "$x^2$" in text for text in texts(svg))
    module = Importance(1, HOSTILE, {HOSTILE: [1.0]})
    assert b"<script" not in importance_heat_map(module) + svg


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_heat_map_has_a_row_a_client_and_a_column_a_round(quantity):
    drawn = texts(client_heat_map(TRAININGS, quantity))
    assert {"client 0 (rank 2)", "client 1 (rank 4)", "client 2 (rank 8)"} <= set(drawn)
    assert QUANTITIES[quantity].title in drawn


def test_many_clients_are_drawn_by_rank():
    many = [client_record(1, c % 3, partition_id=c) for c in range(100)]
    drawn = texts(client_heat_map(many, "loss"))
    assert {"rank 2", "rank 4", "rank 8", "training loss, mean of a rank"} <= set(drawn)


def test_unknown_values_leave_white_cells():
    assert texts(client_heat_map([client_record(1, 0, loss=NAN)], "loss"))


def test_importance_is_drawn_by_module_and_component():
    found = Importance(5, "smoothed sensitivity", {"layer.0.query": [3.0, NAN], "layer.1": [1.0]})
    drawn = texts(importance_heat_map(found))
    assert {"layer.0.query", "layer.1", "component"} <= set(drawn)
    assert "importance (smoothed sensitivity) after round 5" in drawn
