"""Plans with cores: what they may hold, what they cost, and what a client refuses."""

from dataclasses import replace

import pytest

from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.alignment import Alignment
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.plan_parts.tail_pruning import TailPruning
from hafl_app.plan_parts.trained_core import Core

CORE = Core(size=2, rank=6, seed=7, scaled=True)
MODULE = ModulePlan(tuple(range(6)), (4, 5, 0, 1), 2.0, factors="B", core=CORE)
PLAN = TrainPlan({"q": MODULE, "v": ModulePlan((0, 1), (0, 1))})
SHAPES = {"q": (70, 50), "v": (70, 50)}


def test_survives_the_wire():
    read = TrainPlan.from_json(PLAN.to_json())
    assert read == PLAN
    assert read.modules["q"].core == CORE


def test_bytes_are_those_of_the_cores():
    assert MODULE.held_sides((70, 50)) == MODULE.uploaded_sides((70, 50)) == (2, 0)
    assert PLAN.held_bytes({"q": (70, 50)}) == 4 * 2 * 6  # three cores of 2 x 2
    assert TrainPlan({"q": MODULE}).upload_bytes(SHAPES) == 4 * 2 * 4  # two of them
    assert PLAN.held_bytes(SHAPES) == 4 * (2 * 6 + 2 * 120)


@pytest.mark.parametrize(
    "change",
    [
        {"factors": "both"},
        {"factors": "A"},
        {"gain": 2.0},
        {"budget": 2},
        {"held": tuple(range(5)), "trainable": (0, 1)},
        {"held": (0, 1, 3, 2)},
        {"held": (1, 2), "trainable": (1, 2)},
        {"held": (0, 1, 2, 3, 6, 7)},
        {"trainable": (0,)},
        {"trainable": (1, 0)},
    ],
)
def test_a_module_that_a_core_cannot_have_is_refused(change):
    with pytest.raises(ValueError, match="core"):
        replace(MODULE, **({"trainable": (0, 1)} | change))


@pytest.mark.parametrize(
    "change",
    [
        {"tail": TailPruning(0.9, 0.1, 1)},
        {"importance": "smoothed"},
        {"align": Alignment("A")},
        {"upload": "sparse", "density": 0.5},
    ],
)
def test_a_plan_that_tells_columns_apart_is_refused(change):
    with pytest.raises(ValueError, match="core"):
        replace(TrainPlan({"q": MODULE}), **change)


@pytest.mark.parametrize(
    "wrong",
    [{"size": 0}, {"size": True}, {"rank": 0}, {"seed": -1}, {"seed": 1.0}, {"scaled": 1}],
)
def test_a_core_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="core"):
        replace(CORE, **wrong)


def test_unknown_keys_of_a_core_are_refused():
    text = PLAN.to_json()
    assert '"scaled":true' in text
    for other in ('"scaled":true,"more":1', '"scale":true'):
        with pytest.raises(ValueError, match="not a train plan"):
            TrainPlan.from_json(text.replace('"scaled":true', other))
    with pytest.raises(ValueError, match="not a train plan"):
        TrainPlan.from_json(text.replace('{"size":2', '{"size":"2"'))
