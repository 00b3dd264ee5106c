"""Replies whose components the node chose: an honest one is read, a false one is rejected."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Message, MessageType, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from layout_words import change_layout

from hafl_app.engines.in_process import server_identity
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.component_choice import ComponentChoice
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.server.reply_validation import ReplyError, executed_plan, read_update
from hafl_app.wire.arrays import RecordError
from hafl_app.wire.records import AdapterArrays, adapter_content, read_adapter

SHAPES = {"query": (7, 5), "dense": (6, 9)}
CHOSEN = {"query": (1, 3), "dense": (0,)}
PLAN = TrainPlan(
    {name: ModulePlan((0, 1, 2, 3), (0, 1, 2, 3), budget=2 - i) for i, name in enumerate(SHAPES)},
    choice=ComponentChoice("contribution", "model"),
)


def arrays(components=CHOSEN, ranks=None):
    modules = {}
    for name, (height, width) in SHAPES.items():
        rank = (ranks or {}).get(name, len(components.get(name, (0,))))
        modules[name] = (np.ones((rank, width), np.float32), np.ones((height, rank), np.float32))
    return AdapterArrays(modules, components=components)


def message(content):
    with server_identity():
        request = Message(RecordDict(), 2, MessageType.TRAIN)
        request.metadata.__dict__["_message_id"] = "m"
        return Message(content, reply_to=request)


def read(update, plan=PLAN):
    return read_update(message(adapter_content(update)), plan, {}, SHAPES)


def test_an_honest_choice_is_read_and_becomes_the_plan():
    got = read(arrays())
    assert got.components == CHOSEN
    modules = executed_plan(got, PLAN).modules
    assert {name: module.trainable for name, module in modules.items()} == CHOSEN


@pytest.mark.parametrize(
    ("components", "match"),
    [
        ({"query": (1, 4), "dense": (0,)}, "query: components 1,4 are not some of 0,1,2,3"),
        ({"query": (1, 1), "dense": (0,)}, "query: components 1,1 are not some of"),
        ({"query": (3, 1), "dense": (0,)}, "query: components 3,1 are not some of"),
        ({"query": (0, 1, 2), "dense": (0,)}, "4 components chosen over the model, expected 3"),
        ({"query": (1,), "dense": (0,)}, "2 components chosen over the model, expected 3"),
        ({}, "a choice without, or beyond, module 'dense'"),
    ],
)
def test_another_choice_is_rejected(components, match):
    with pytest.raises(ReplyError, match=match):
        read(arrays(components))


def test_by_module_each_budget_holds():
    plan = replace(PLAN, choice=ComponentChoice("contribution", "module"))
    read(arrays(), plan)
    with pytest.raises(ReplyError, match="query: 3 components chosen, expected 2"):
        read(arrays({"query": (1, 2, 3), "dense": ()}), plan)


def test_components_that_were_not_asked_for_are_rejected():
    modules = {name: ModulePlan((0, 1, 2, 3), CHOSEN[name]) for name in SHAPES}
    with pytest.raises(ReplyError, match="the plan leaves no choice"):
        read(arrays(), TrainPlan(modules))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("0-9999", "'query' names 10000 components and has 2"),
        ("0-99999", "more than 65536"),
        ("3-1", "runs backwards"),
        ("x", "is not like"),
        (7, "not a list of text"),
    ],
)
def test_a_malformed_list_is_no_record(text, match):
    content = adapter_content(arrays())
    change_layout(content, components=[text, "0"])
    with pytest.raises(RecordError, match=match):
        read_adapter(content)


def test_a_rank_without_numbers_is_no_record():
    content = adapter_content(arrays())
    change_layout(
        content,
        **{"ranks": [2**16, 1], "in-features": [0, 33], "out-features": [0, 6]},
        components=["0-65535", "0"],
    )
    with pytest.raises(RecordError, match="neither factor"):
        read_adapter(content)


@given(st.data())
def test_components_survive_the_wire(data):
    ranks = {name: data.draw(st.integers(0, 4)) for name in SHAPES}
    components = {
        name: tuple(sorted(data.draw(st.sets(st.integers(0, 90), min_size=r, max_size=r))))
        for name, r in ranks.items()
    }
    assert read_adapter(adapter_content(arrays(components, ranks))).components == components
