"""Damaged and hostile requests at a node: refused by name, or read as exactly what they say."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hafl_app.data.labels import label_fault
from hafl_app.engines.in_process import server_identity
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.wire.arrays import RecordError
from hafl_app.wire.records import (
    CONFIG,
    LABEL_NAMES,
    PARTITION_ID,
    PLAN,
    SERVER_ROUND,
    AdapterArrays,
    adapter_content,
    plan_record,
)
from hafl_app.wire.requests import read_query, read_request

SOAK = settings(max_examples=10_000, suppress_health_check=list(HealthCheck))
MODULES = {"q": (np.ones((3, 5), np.float32), np.ones((7, 3), np.float32))}
PLANS = (
    TrainPlan({"q": ModulePlan((0, 1, 4), (0, 4))}),
    TrainPlan({"q": ModulePlan((0, 1), (0,))}),  # not what the adapter holds
    TrainPlan({}),
)

integers = st.integers(-3, 12) | st.sampled_from([-(2**63), 2**31, 2**63 - 1])
texts = st.sampled_from(["", "food", "a\nb", "\x00", "\x1b[2J", "x" * 201]) | st.text(max_size=5)
values = (
    integers
    | st.floats()
    | st.booleans()
    | texts
    | st.binary(max_size=9)
    | st.lists(texts, max_size=4)
    | st.lists(integers, max_size=4)
    | st.just([f"class {i}" for i in range(10_001)])
    | st.just("x" * 100_000)
)
keys = st.sampled_from([SERVER_ROUND, PARTITION_ID, LABEL_NAMES, "other"])
configs = st.dictionaries(keys, values, max_size=4).map(ConfigRecord)
honest = st.just(ConfigRecord({SERVER_ROUND: 2, PARTITION_ID: 5, LABEL_NAMES: ["food", "music"]}))
records = st.one_of(honest, configs, st.just(MetricRecord({"x": 1.0})))


@st.composite
def contents(draw):
    """An honest content of which one part or more is another, or is missing."""
    content = adapter_content(AdapterArrays(MODULES), **{PLAN: plan_record(PLANS[0])})
    content[CONFIG] = draw(records)
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(content)))
        if draw(st.booleans()):
            del content[name]
        elif name == PLAN:
            content[name] = draw(st.sampled_from([plan_record(plan) for plan in PLANS]) | configs)
        else:
            content[name] = draw(records)
        if not content:
            break
    return content


def check(content):
    """Only `RecordError` in one line, or a request with the very values of the content."""
    with server_identity():
        message = Message(content, 7, MessageType.TRAIN)
    config = content.get(CONFIG)
    config = config if isinstance(config, ConfigRecord) else {}
    for read in (read_query, read_request):
        try:
            request = read(message)
        except RecordError as error:
            assert "\n" not in str(error)
            assert "\x1b" not in str(error)
            assert len(str(error)) < 1000
            continue
        labels = config.get(LABEL_NAMES)
        assert request.label_names == (None if labels is None else tuple(labels))
        assert not label_fault(request.label_names or ())
        if read is read_request:
            assert request.server_round == config[SERVER_ROUND] >= 0
            assert request.partition_id == config.get(PARTITION_ID)
            held = {name: len(module.held) for name, module in request.plan.modules.items()}
            assert held == {name: f.rank for name, f in request.adapter.modules.items()}


def test_what_is_not_damaged_passes_the_check():
    content = adapter_content(AdapterArrays(MODULES), **{PLAN: plan_record(PLANS[0])})
    content[CONFIG] = ConfigRecord({SERVER_ROUND: 2, LABEL_NAMES: ["food", "music"]})
    check(content)
    with server_identity():
        assert read_request(Message(content, 7, MessageType.TRAIN)).server_round == 2


@settings(max_examples=400, suppress_health_check=list(HealthCheck), deadline=None)
@given(contents())
def test_damage_is_refused_or_read_as_it_is(content):
    check(content)


@pytest.mark.soak
@SOAK
@given(contents())
def test_ten_thousand_damages_are_refused_or_read_as_they_are(content):
    check(content)


def test_an_empty_message_is_a_query_and_no_request():
    with server_identity():
        message = Message(RecordDict(), 7, MessageType.TRAIN)
    assert read_query(message).label_names is None
    with pytest.raises(RecordError):
        read_request(message)
