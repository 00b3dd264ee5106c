"""Requests with a correction of gradients: what a node reads, what they cost, what comes back."""

from dataclasses import replace

import pytest
import torch
from driving import HEAD, SHAPES, Client, noise, strategy_named, update_of
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict

from hafl_app.engines.in_process import server_identity
from hafl_app.lowrank.factors import Adapter
from hafl_app.server.control_variates import ControlVariates
from hafl_app.server.round_messages import RoundMessages
from hafl_app.server.traffic import Ledger
from hafl_app.training.adapter_arrays import to_arrays
from hafl_app.training.settings import ClientSettings
from hafl_app.wire.arrays import RecordError
from hafl_app.wire.records import (
    CORRECTION,
    METRICS,
    NUM_EXAMPLES,
    PLAN,
    STEPS,
    AdapterArrays,
    adapter_content,
    plan_record,
    with_correction,
)
from hafl_app.wire.requests import read_request

CLIENTS = (Client(rank=2, num_examples=30, partition_id=0), Client(4, 11, 1))
# Of the factors of ranks 2 and 4, and of two heads.
NUMBERS = 6 * sum(s.out_features + s.in_features for s in SHAPES.values()) + 2 * (3 * 7 + 3)


@pytest.fixture(autouse=True)
def _server():
    with server_identity():
        yield


class Exchange:
    """A second round: both clients have a variate of the first one."""

    def __init__(self, corrected=True):
        self.strategy = strategy_named("rbla")
        self.ledger = Ledger()
        exchange = RoundMessages(self.ledger, 2, "train")
        own = {}
        for client in CLIENTS:
            update = replace(update_of(self.strategy, client, noise), steps=3)
            after = ControlVariates().after(update, self.strategy.global_adapter, ClientSettings())
            own[client.partition_id] = after
        self.variates = ControlVariates(own)
        if corrected:
            exchange.correct(self.variates.correction)
        self.exchange = exchange
        self.profiles = [replace(c.profile, node_id=70 + c.partition_id) for c in CLIENTS]
        self.plans = [self.strategy.plan(p, 2) for p in self.profiles]
        self.requests = exchange.messages(
            self.profiles, self.plans, self.strategy.dispatch, MessageType.TRAIN
        )
        for request in self.requests:
            request.metadata.__dict__["_message_id"] = str(id(request))

    def reply(self, number, **metrics):
        adapter = update_of(self.strategy, CLIENTS[number], noise).adapter
        values = {NUM_EXAMPLES: CLIENTS[number].num_examples, "loss": 0.5, **metrics}
        content = adapter_content(
            AdapterArrays(*to_arrays(adapter)), **{METRICS: MetricRecord(values)}
        )
        return Message(content, reply_to=self.requests[number])


def test_each_client_reads_its_own_correction():
    made = Exchange()
    for client, plan, request in zip(CLIENTS, made.plans, made.requests, strict=True):
        got = read_request(request).correction.tensors()
        expected = made.variates.correction(client.partition_id, plan).tensors()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_without_variates_there_is_none():
    for request in Exchange(corrected=False).requests:
        assert CORRECTION not in request.content
        assert read_request(request).correction is None


def test_its_bytes_are_in_the_ledger():
    down = []
    for corrected in (False, True):
        made = Exchange(corrected)
        made.exchange.close(
            made.exchange.validate_training([made.reply(0, steps=2), made.reply(1, steps=2)])
        )
        down.append(made.ledger.of_phase("train").bytes_down)
    records = 2 * 1700  # heads of records, layouts and arrays
    assert 4 * NUMBERS < down[1] - down[0] < 4 * NUMBERS + records


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({}, "no steps, which federation.scaffold needs"),
        ({STEPS: 0}, "no steps, which federation.scaffold needs"),
        ({STEPS: 2.5}, "steps is 2.5, expected a whole number"),
        ({STEPS: -1}, "expected 0 to inf"),
    ],
)
def test_a_reply_without_its_steps_is_rejected(metrics, reason):
    made = Exchange()
    (judged,) = made.exchange.validate_training([made.reply(0, **metrics)])
    assert reason in judged.error


def test_the_steps_of_a_reply_are_in_the_update():
    made = Exchange()
    (judged,) = made.exchange.validate_training([made.reply(0, steps=7)])
    assert judged.update.steps == 7


def tampered(change):
    """Return a request whose correction was changed."""
    made = Exchange()
    plan, sent = made.plans[0], made.strategy.dispatch(made.plans[0])
    correction = change(made.variates.correction(0, plan))
    content = RecordDict(
        {
            **adapter_content(AdapterArrays(*to_arrays(sent)), config=ConfigRecord()),
            PLAN: plan_record(plan),
        }
    )
    content["config"] = ConfigRecord({"server-round": 2})
    content = with_correction(content, AdapterArrays(*to_arrays(correction)))
    return Message(content, 70, MessageType.TRAIN)


class TestMalformed:
    def test_the_untampered_one_is_read(self):
        assert read_request(tampered(lambda correction: correction)).correction is not None

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda c: c.map(lambda f: f.select((0,))), "correction of 'dense': .1, 6, 9., exp"),
            (lambda c: c.map(lambda f: f.only("A")), "correction of 'dense': .2, 0, 9., expected"),
            (lambda c: c.with_head({}), "correction of 'head bias': none, expected .3,"),
            (lambda c: Adapter({}, c.head), "correction of 'dense': none, expected .2, 6, 9"),
            (
                lambda c: Adapter({**c.modules, "other": c.modules["query"]}, c.head),
                "correction of 'other': .*, expected none",
            ),
            (
                lambda c: c.with_head({n: torch.full(s, torch.nan) for n, s in HEAD.items()}),
                "correction 'head/.*': not all numbers are finite",
            ),
        ],
    )
    def test_is_refused_by_name(self, change, words):
        with pytest.raises(RecordError, match=words):
            read_request(tampered(change))

    @pytest.mark.parametrize("left", ["correction", "correction-layout"])
    def test_half_of_one_is_refused(self, left):
        request = tampered(lambda correction: correction)
        request.content[left] = MetricRecord() if left == CORRECTION else ArrayRecord()
        with pytest.raises(RecordError, match="no readable correction"):
            read_request(request)
