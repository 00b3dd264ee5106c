"""Requests as a node reads them: every part once, and none that does not fit the others."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

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

IN, OUT, RANK = 5, 7, 3
PLAN_OF_RANK = TrainPlan({"dense": ModulePlan((0, 1, 4), (0, 4))})


def matrices(rank=RANK, dtype=np.float32):
    rng = np.random.default_rng(rank)
    return (
        rng.normal(size=(rank, IN)).astype(dtype),
        rng.normal(size=(OUT, rank)).astype(dtype),
    )


def request(plan=PLAN_OF_RANK, adapter=None, **config):
    config = ConfigRecord({SERVER_ROUND: 6} | {k.replace("_", "-"): v for k, v in config.items()})
    adapter = adapter or AdapterArrays({"dense": matrices()}, {"bias": np.ones(2, np.float32)})
    content = adapter_content(adapter, **{PLAN: plan_record(plan), CONFIG: config})
    return message(content)


def message(content, kind=MessageType.TRAIN):
    with server_identity():
        return Message(content, 7, kind)


def test_every_part_arrives():
    read = read_request(request(partition_id=9, label_names=["music", "food"]))

    assert (read.server_round, read.partition_id) == (6, 9)
    assert read.label_names == ("music", "food")
    assert read.plan == PLAN_OF_RANK
    lora_A, lora_B = matrices()
    np.testing.assert_array_equal(read.adapter.modules["dense"].lora_A.numpy(), lora_A)
    np.testing.assert_array_equal(read.adapter.modules["dense"].lora_B.numpy(), lora_B)
    assert read.adapter.head["bias"].tolist() == [1.0, 1.0]


def test_a_node_with_a_partition_gets_neither_number_nor_classes():
    read = read_request(request())

    assert (read.partition_id, read.label_names) == (None, None)


@pytest.mark.parametrize("value", [-1, 1.5, "1", True, [1]])
@pytest.mark.parametrize("key", [SERVER_ROUND, PARTITION_ID])
def test_what_is_no_number_is_rejected_by_name(key, value):
    with pytest.raises(RecordError, match=f"config: {key!r} is .*expected a whole number from 0"):
        read_request(request(**{key: value}))


def test_a_request_without_a_round_is_rejected():
    content = request().content
    del content[CONFIG]

    with pytest.raises(RecordError, match="'server-round' is None"):
        read_request(message(content))


@pytest.mark.parametrize(
    ("plan", "adapter", "words"),
    [
        (TrainPlan({"dense": ModulePlan((0,), ())}), None, "adapter has 3 components, the plan 1"),
        (TrainPlan({}), None, "adapter has 3 components, the plan no"),
        (PLAN_OF_RANK, AdapterArrays({}), "adapter has no components, the plan 3"),
    ],
)
def test_a_plan_for_other_components_is_rejected(plan, adapter, words):
    with pytest.raises(RecordError, match=f"module 'dense': the {words}"):
        read_request(request(plan, adapter))


def test_rounded_numbers_are_rejected():
    pair = matrices(dtype=np.uint16)

    with pytest.raises(RecordError, match="numbers are bf16, expected fp32"):
        read_request(request(adapter=AdapterArrays({"dense": pair}, numbers="bf16")))


class TestQuery:
    def test_carries_the_classes_or_nothing(self):
        config = ConfigRecord({LABEL_NAMES: ["food", "music"]})
        query = message(RecordDict({CONFIG: config}), MessageType.QUERY)

        assert read_query(query).label_names == ("food", "music")
        assert read_query(message(RecordDict(), MessageType.QUERY)).label_names is None

    @pytest.mark.parametrize(
        ("names", "words"),
        [
            (["a", "a"], "repeated"),
            (["a", "x" * 201], "a label name of 201 characters"),
            (["a", "b\nERROR forged"], "control characters"),
            ([f"{i}" for i in range(10_001)], "10001 label names, expected at most 10000"),
        ],
    )
    def test_classes_that_no_run_can_have_are_rejected(self, names, words):
        content = RecordDict({CONFIG: ConfigRecord({LABEL_NAMES: names})})

        with pytest.raises(RecordError, match=f"'label-names': .*{words}") as caught:
            read_query(message(content, MessageType.QUERY))
        assert "forged" not in str(caught.value)

    @pytest.mark.parametrize("names", ["food", [1, 2], 3])
    def test_other_values_are_rejected(self, names):
        content = RecordDict({CONFIG: ConfigRecord({LABEL_NAMES: names})})

        with pytest.raises(RecordError, match="'label-names' is not a list of text"):
            read_query(message(content, MessageType.QUERY))
