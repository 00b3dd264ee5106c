"""Pairing of replies with the requests of a phase."""

from dataclasses import replace

import pytest
import torch
from driving import Client, noise, strategy_named, update_of
from flwr.app import Message, MessageType, MetricRecord
from flwr.server.superlink.linkstate.utils import (
    create_message_error_unavailable_ins_message,
    create_message_error_unavailable_res_message,
)

from hafl_app.engines.in_process import server_identity
from hafl_app.server.round_messages import RoundMessages
from hafl_app.server.traffic import Ledger
from hafl_app.training.adapter_arrays import to_arrays
from hafl_app.wire.records import METRICS, NUM_EXAMPLES, AdapterArrays, adapter_content

CLIENTS = (Client(rank=2, num_examples=30, partition_id=0), Client(4, 11, 1))
NOTHING_ASKED = "a reply to no request of this round"


@pytest.fixture(autouse=True)
def _server():
    with server_identity():
        yield


class Round:
    """One round's requests to both clients, and the replies that they would send."""

    def __init__(self, server_round: int) -> None:
        strategy = strategy_named("zero_padding")
        profiles = [replace(c.profile, node_id=70 + c.partition_id) for c in CLIENTS]
        plans = [strategy.plan(profile, server_round) for profile in profiles]
        self.exchange = RoundMessages(Ledger(), server_round, "train")
        self.requests = self.exchange.messages(
            profiles, plans, strategy.dispatch, MessageType.TRAIN
        )
        # Another change in every round.
        clients = [replace(c, noise_seed=10 * server_round + c.partition_id) for c in CLIENTS]
        self.adapters = [update_of(strategy, client, noise).adapter for client in clients]
        for request in self.requests:  # as a grid does when it sends them
            request.metadata.__dict__["_message_id"] = f"{server_round}/{id(request)}"

    def reply(self, number: int) -> Message:
        metrics = MetricRecord({NUM_EXAMPLES: CLIENTS[number].num_examples, "loss": 0.5})
        arrays = AdapterArrays(*to_arrays(self.adapters[number]))
        content = adapter_content(arrays, **{METRICS: metrics})
        return Message(content, reply_to=self.requests[number])


def test_a_late_reply_to_an_earlier_round_does_not_take_the_place_of_this_ones(caplog):
    earlier, now = Round(1), Round(2)

    judged = now.exchange.validate_training([earlier.reply(1), now.reply(1), now.reply(0)])

    assert [one.update.num_examples for one in judged] == [30, 11]
    for one, adapter in zip(judged, now.adapters, strict=True):
        for name, factors in adapter.modules.items():
            assert torch.equal(one.update.adapter.modules[name].lora_B, factors.lora_B)
    assert [r.getMessage() for r in caplog.records] == [f"round 2, node 71: {NOTHING_ASKED}"]


def test_a_late_reply_alone_is_no_reply(caplog):
    earlier, now = Round(1), Round(2)

    judged = now.exchange.validate_training([earlier.reply(0), now.reply(1)])

    assert [one.request.profile.partition_id for one in judged] == [1]
    reports = now.exchange.close(judged)
    assert [report.error for report in reports] == ["no reply in time", ""]
    assert f"round 2, node 70: {NOTHING_ASKED}" in caplog.text


def test_the_first_of_two_replies_counts(caplog):
    now = Round(1)
    second = Round(3)
    second.requests = now.requests

    judged = now.exchange.validate_training([now.reply(0), second.reply(0), now.reply(1)])

    got = judged[0].update.adapter.modules["query"].lora_A
    assert torch.equal(got, now.adapters[0].modules["query"].lora_A)
    assert "round 1, node 70: a second reply" in caplog.text


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["lora_A", "lora_B", "head"])
def test_one_number_that_is_not_finite_is_found(number, where):
    now = Round(1)
    # What is sent shares the head with the clients' adapters.
    head = {name: tensor.clone() for name, tensor in now.adapters[1].head.items()}
    now.adapters[1] = now.adapters[1].with_head(head)
    tensors = {"head": head["bias"], **vars(now.adapters[1].modules["dense"])}
    tensors[where].view(-1)[1] = number

    good, bad = now.exchange.validate_training([now.reply(0), now.reply(1)])

    assert not good.error
    assert bad.error.startswith("head bias: " if where == "head" else f"dense: {where}: ")
    assert bad.error.endswith(f"not finite, the first is {number}")


def test_finite_numbers_however_large_pass_this_judge():
    now = Round(1)
    now.adapters[0].modules["dense"].lora_A.fill_(3e38)

    (judged,) = now.exchange.validate_training([now.reply(0)])

    assert not judged.error
    assert 1e37 < judged.update.size < float("inf")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda asked: create_message_error_unavailable_res_message(asked, "node_unavail"),
            "Node Unavailable",
        ),
        (
            lambda asked: create_message_error_unavailable_ins_message(asked.message_id, 1),
            "Message Unavailable",
        ),
    ],
    ids=["a node that died", "an answer that expired"],
)
def test_flowers_own_reason_for_a_node_that_does_not_answer_is_given(caplog, make, told):
    now = Round(1)
    own = make(now.requests[1].metadata)

    judged = now.exchange.validate_training([own, now.reply(0)])

    assert [one.request.profile.node_id for one in judged] == [70, 71]
    assert judged[1].error == " ".join(own.error.reason.split())
    assert told in judged[1].error
    reports = now.exchange.close(judged)
    assert [report.error for report in reports] == ["", judged[1].error]
    assert NOTHING_ASKED not in caplog.text


def test_flowers_own_reason_for_what_was_asked_earlier_is_turned_away(caplog):
    earlier, now = Round(1), Round(2)
    own = create_message_error_unavailable_res_message(earlier.requests[1].metadata, "node_unavail")

    assert now.exchange.validate_training([own]) == []
    assert f"round 2, node 1: {NOTHING_ASKED}" in caplog.text
