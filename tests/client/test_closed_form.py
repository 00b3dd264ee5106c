"""A node's sums of features leave it in a run that says so, and in no other."""

import shlex

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from running import TINY

from hafl_app.client_app import app
from hafl_app.config.compose import compose
from hafl_app.engines.in_process import InProcessGrid, server_identity
from hafl_app.lowrank.factors import initial_adapter
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.run import build
from hafl_app.training.adapter_arrays import to_arrays
from hafl_app.training.lora_model import adapter_shapes
from hafl_app.wire.faults import Fault, fault_of
from hafl_app.wire.feature_sums import SUMS
from hafl_app.wire.message_types import EVALUATE_TEMPERATURES, QUERY_FEATURE_SUMS
from hafl_app.wire.records import CONFIG, AdapterArrays, adapter_content, plan_record

CLOSED = "model.head=closed_form"


def ask(kind: str, *overrides: str, share: str | None = None) -> Message:
    """Ask the first of five nodes for what a head in closed form needs."""
    overrides = (*TINY, "strategy=zero_padding", *overrides)
    spec = build.model_spec(compose(overrides), 20)
    adapter = initial_adapter(adapter_shapes(spec), 2, seed=0)
    plan = TrainPlan({n: ModulePlan((0, 1), ()) for n in adapter.modules}, head="frozen")
    config = ConfigRecord({"server-round": 0})
    arrays = AdapterArrays(*to_arrays(adapter))
    content = adapter_content(arrays, **{CONFIG: config, "plan": plan_record(plan)})
    node = {"partition-id": 0, "num-partitions": 5} | ({"share": share} if share else {})
    with server_identity():
        grid = InProcessGrid(app, 1, {"overrides": shlex.join(overrides)}, [node])
        (reply,) = grid.send_and_receive([Message(RecordDict(dict(content)), 1, kind)])
    return reply


@pytest.mark.parametrize("kind", [QUERY_FEATURE_SUMS, EVALUATE_TEMPERATURES])
def test_a_run_that_says_so_gets_them(kind):
    reply = ask(kind, CLOSED)
    assert reply.has_content()
    assert SUMS in reply.content


def test_no_other_run_gets_sums():
    reply = ask(QUERY_FEATURE_SUMS, "model.head=averaged")
    assert fault_of(reply) == Fault.REFUSED
    assert "sums of features are asked for in a run of model.head=averaged" in reply.error.reason


def test_a_node_that_withholds_them_sends_none():
    reply = ask(QUERY_FEATURE_SUMS, CLOSED, share="scores,losses")
    assert fault_of(reply) == Fault.REFUSED
    assert "needs the sums of this node" in reply.error.reason
