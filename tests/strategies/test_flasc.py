"""FLASC: the two masks, the mean of changes, the codec of sparse numbers, and its refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from driving import MAX_RANK, Client, merge, noise, run_options, strategy_named, update_of
from flwr.app import Message, MessageType, MetricRecord
from hypothesis import given
from hypothesis import strategies as st

from hafl_app.engines.in_process import server_identity
from hafl_app.lowrank.factors import Adapter
from hafl_app.server.method import StrategyError
from hafl_app.server.round_messages import RoundMessages
from hafl_app.server.traffic import Ledger
from hafl_app.wire.arrays import RecordError
from hafl_app.wire.records import (
    METRICS,
    NUM_EXAMPLES,
    AdapterArrays,
    adapter_content,
    read_adapter,
)
from hafl_app.wire.uploads import encode_upload

CLIENTS = [Client(rank, n, i) for i, (rank, n) in enumerate([(1, 10), (4, 25), (2, 7)])]
NUMBERS = MAX_RANK * (7 + 5 + 6 + 9)
SCALING = 4.0  # lora_alpha 16 over the global rank


def flat(modules):
    """All numbers in the order of the equation's ties, lora_B without PEFT's scaling."""
    parts = []
    for name in sorted(modules):
        parts.append(modules[name].lora_A.double().numpy().ravel())
        parts.append(modules[name].lora_B.double().numpy().ravel() / SCALING)
    return np.concatenate(parts)


def top(values, density):
    kept = np.zeros(len(values), bool)
    kept[np.argsort(-np.abs(values), kind="stable")[: max(1, int(density * len(values)))]] = True
    return np.where(kept, values, 0.0)


def sent_and_received(strategy, client):
    """Let a client's upload go over the wire, and return it and what was judged."""
    profile = replace(client.profile, node_id=7)
    exchange = RoundMessages(Ledger(), 1, "train")
    with server_identity():
        (request,) = exchange.messages(
            [profile], [strategy.plan(profile, 1)], strategy.dispatch, MessageType.TRAIN
        )
        request.metadata.__dict__["_message_id"] = "1"
        trained = update_of(strategy, client, noise)
        arrays, _ = encode_upload(trained.adapter, trained.sent, trained.plan, {}, {})
        metrics = MetricRecord({NUM_EXAMPLES: client.num_examples, "loss": 0.5})
        reply = Message(adapter_content(arrays, **{METRICS: metrics}), reply_to=request)
    (judged,) = exchange.validate_training([reply])
    return request, trained, judged


class TestTheMasks:
    @pytest.mark.parametrize("client", CLIENTS)
    def test_the_largest_numbers_are_sent(self, client):
        strategy = strategy_named("flasc")
        plan = strategy.plan(client.profile, 1)
        assert plan.density == client.rank / MAX_RANK
        expected = top(flat(strategy.global_adapter.modules), plan.density)

        sent = strategy.dispatch(plan)

        np.testing.assert_allclose(flat(sent.modules), expected, rtol=1e-6)
        assert (expected == 0).any() == (client.rank < MAX_RANK)

    @pytest.mark.parametrize("client", CLIENTS)
    def test_the_largest_changes_come_back(self, client):
        request, trained, judged = sent_and_received(strategy_named("flasc"), client)

        assert judged.error == ""
        sent = read_adapter(request.content).modules
        for name, factors in trained.sent.modules.items():  # zeros travel as what they are
            assert np.array_equal(sent[name][1], factors.lora_B.numpy())
        change = flat(trained.adapter.modules) - flat(trained.sent.modules)
        got = flat(judged.update.adapter.modules) - flat(trained.sent.modules)
        np.testing.assert_allclose(got, top(change, client.rank / MAX_RANK), atol=1e-6)

    def test_all_of_it_is_trained(self):
        plan = strategy_named("flasc").plan(CLIENTS[0].profile, 1)
        assert {len(m.trainable) for m in plan.modules.values()} == {MAX_RANK}


@pytest.mark.parametrize("step", [1.0, 0.5])
def test_the_server_adds_the_mean_change_to_what_it_has(step):
    strategy = strategy_named("flasc", f"strategy.server_step={step}")
    updates = [sent_and_received(strategy, client)[2].update for client in CLIENTS]

    after = merge(strategy, updates)

    expected = flat(strategy.global_adapter.modules)
    for update in updates:
        change = flat(update.adapter.modules) - flat(update.sent.modules)
        expected = expected + step * update.num_examples / 42 * change
    np.testing.assert_allclose(flat(after), expected, rtol=1e-5, atol=1e-6)


def test_bytes_are_those_of_the_kept_numbers_and_a_mask():
    head = 4 * (3 * 7 + 3)
    strategy = strategy_named("flasc")
    assert strategy.payload_bytes(CLIENTS[0].profile) == (27 * 4 + NUMBERS // 8 + 1 + head,) * 2
    assert strategy.payload_bytes(CLIENTS[1].profile) == (NUMBERS * 4 + head,) * 2
    request, _, _ = sent_and_received(strategy, CLIENTS[0])
    assert len(request.content["arrays"]["factors"].data) == 27 * 4 + NUMBERS // 8 + 1


class TestHostileNodes:
    def arrays(self, kept):
        lora_A, lora_B = np.zeros((MAX_RANK, 5), np.float32), np.zeros((7, MAX_RANK), np.float32)
        lora_A.ravel()[:kept] = 1
        return AdapterArrays({"query": (lora_A, lora_B)}, numbers="sparse")

    def test_more_numbers_than_the_density_are_rejected(self):
        strategy, client = strategy_named("flasc"), CLIENTS[0]
        profile = replace(client.profile, node_id=7)
        exchange = RoundMessages(Ledger(), 1, "train")
        with server_identity():
            (request,) = exchange.messages(
                [profile], [strategy.plan(profile, 1)], strategy.dispatch, MessageType.TRAIN
            )
            request.metadata.__dict__["_message_id"] = "1"
            trained = update_of(strategy, client, noise)
            arrays, _ = encode_upload(trained.adapter, trained.sent, trained.plan, {}, {})
            arrays.modules["query"][0][:] = 1
            metrics = MetricRecord({NUM_EXAMPLES: 10, "loss": 0.5})
            reply = Message(adapter_content(arrays, **{METRICS: metrics}), reply_to=request)
        (judged,) = exchange.validate_training([reply])
        assert "numbers that are not 0, expected at most 27" in judged.error

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda data: data[:-1], "its mask says"),
            (lambda data: data + b"\0", "its mask says"),
            (lambda data: data[:3], "too few for 48 numbers"),
            (lambda data: b"\xff" + data[1:], "its mask says"),
        ],
    )
    def test_other_bytes_are_no_record(self, change, match):
        content = adapter_content(self.arrays(3))
        array = content["arrays"]["factors"]
        array.data = change(array.data)
        with pytest.raises(RecordError, match=match):
            read_adapter(content)

    @given(st.data())
    def test_sparse_numbers_survive_the_wire(self, data):
        sent = self.arrays(0)
        values = st.sampled_from([0.0, 1.0, -2.5, float("inf"), 1e-42])
        lora_A, lora_B = (
            np.array(data.draw(st.lists(values, min_size=p.size, max_size=p.size)), np.float32)
            for p in sent.modules["query"]
        )
        modules = {"query": (lora_A.reshape(MAX_RANK, 5), lora_B.reshape(7, MAX_RANK))}
        got = read_adapter(adapter_content(AdapterArrays(modules, numbers="sparse")))
        assert got.numbers == "sparse"
        for arrived, meant in zip(got.modules["query"], modules["query"], strict=True):
            assert np.array_equal(arrived, meant)


@pytest.mark.parametrize("upload", ["bf16", "int8"])
def test_rounded_uploads_are_refused(upload):
    strategy = strategy_named("flasc")
    strategy.options = run_options(strategy.options, upload=upload)
    with pytest.raises(StrategyError, match=f"federation.upload={upload} is refused"):
        strategy.check([1, 4])


def test_a_client_that_changes_nothing_keeps_what_it_was_not_sent():
    strategy = strategy_named("flasc")
    update = update_of(strategy, CLIENTS[0], lambda factors, _: factors)
    after = merge(strategy, [update])
    for name, before in strategy.global_adapter.modules.items():
        torch.testing.assert_close(after[name].lora_B, before.lora_B)
    assert isinstance(update.sent, Adapter)
    assert (update.sent.modules["query"].lora_B == 0).any()
