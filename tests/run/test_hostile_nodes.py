"""Whole runs with a node that means harm, or is out of order: they end as if it were not there."""

import json
import logging

import pytest
import torch
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from running import records, run_tiny
from safetensors.torch import load_file

from hafl_app.client_app import app as client_app
from hafl_app.engines.in_process import InProcessGrid
from hafl_app.server.method import StrategyError
from hafl_app.wire.node_profile import PROFILE
from hafl_app.wire.records import METRICS, NUM_EXAMPLES

pytestmark = pytest.mark.slow  # whole runs

HOSTILE, PARTITION = 5, 4  # the last node, and what it holds
TRILLION = 10**12
ONE_ROUND = ("federation.num_rounds=1", "federation.start_timeout_s=1")


def hostile(profile=None, metrics=None, content=None, node_id=HOSTILE) -> ClientApp:
    """Return an app of which one node states other things than it should.

    Parameters
    ----------
    profile, metrics
        Fields of its profile, and of the metrics of all its replies, that are replaced.
    content
        What it answers to a request to train.
    """
    app = ClientApp()

    def changed(message: Message, context, name, fields):
        reply = client_app(message, context)
        if context.node_id != node_id or reply.has_error() or not fields:
            return reply
        kind = ConfigRecord if name == PROFILE else MetricRecord
        reply.content[name] = kind({**reply.content[name], **fields})
        return reply

    @app.query()
    def query(message, context):
        return changed(message, context, PROFILE, profile)

    @app.train()
    def train(message, context):
        if content is not None and context.node_id == node_id:
            return Message(content, reply_to=message)
        return changed(message, context, METRICS, metrics)

    @app.evaluate()
    def evaluate(message, context):
        return changed(message, context, METRICS, metrics)

    return app


def left_out(summary):
    return summary["left_out"].get(str(HOSTILE), "")


def trained(folder):
    return {line["partition_id"] for line in records(folder, "client") if not line["error"]}


class TestProfiles:
    """What a node says of itself costs itself alone."""

    def test_a_device_with_markup_is_shown_as_it_is_written(self, tmp_path, capsys):
        app = hostile({"device": "[/x]", "device-name": "[bold red]"})

        summary = run_tiny(tmp_path / "out", *ONE_ROUND, app=app)

        assert summary["status"] == "finished"
        assert "[bold red]" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("profile", "words"),
        [
            ({"device-name": "\x1b[2J\x1b]0;pwned\x07"}, r"device_name is '\x1b[2J"),
            ({"device": "line\nforged line"}, "device is"),
            ({"rank-pattern": '{"no.such.layer": 2}'}, "matches none"),
            ({"rank-pattern": json.dumps({f"layer{i}": 2 for i in range(20_000)})}, "characters"),
            ({"num-examples": TRILLION + 1}, "num_examples"),
            ({"num-examples": -3}, "num_examples"),
            ({"rank": 10**6}, "rank"),
            ({"own-data": True, "partition-id": -1, "num-partitions": "x"}, "partition_id is -1"),
            ({"partition-id": 0}, "partition-id 0 is node 1's"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_one_that_no_run_can_use_leaves_out_its_node(self, tmp_path, profile, words, caplog):
        with caplog.at_level(logging.WARNING):
            summary = run_tiny(tmp_path / "out", *ONE_ROUND, app=hostile(profile))

        assert summary["status"] == "finished"
        assert words in left_out(summary)
        assert trained(tmp_path / "out") == {0, 1, 2, 3}
        assert "\x1b" not in caplog.text
        assert f"node {HOSTILE} is left out" in caplog.text

    @pytest.mark.parametrize(
        "profile",
        [
            {"num-partitions": 10**9},
            {"memory-total-mb": 10**9, "memory-free-mb": 0},
            {"bandwidth-kbps": 1},
            {"bandwidth-kbps": 10**9},
            {"num-examples": 0},
            {"rank": 1},
            {"own-data": True},
            {"rank-pattern": json.dumps({"dense|" + "|".join("abcdef"): 1})},
        ],
        ids="-".join,
    )
    @pytest.mark.parametrize("strategy", ["hafl", "haflq"])
    def test_an_odd_one_that_can_be_used_ends_no_run(self, tmp_path, profile, strategy):
        overrides = (*ONE_ROUND, f"strategy={strategy}")
        summary = run_tiny(tmp_path / "out", *overrides, app=hostile(profile))

        assert summary["status"] == "finished"
        assert {0, 1, 2, 3} <= trained(tmp_path / "out")

    def test_a_billion_partitions_make_nobody_wait(self, tmp_path):
        app = hostile({"num-partitions": 10**9})

        summary = run_tiny(
            tmp_path / "out",
            *("federation.num_rounds=1", "federation.start_timeout_s=600"),
            app=app,
        )

        assert summary["seconds"] < 60

    def test_with_two_nodes_the_odd_one_ends_no_run_either(self, tmp_path):
        app = hostile({"rank-pattern": '{"no.such.layer": 2}'}, node_id=2)

        summary = run_tiny(tmp_path / "out", *ONE_ROUND, "federation.num_clients=2", app=app)

        assert "matches none" in summary["left_out"]["2"]
        assert trained(tmp_path / "out") == {0}

    def test_too_few_that_are_left_are_said_before_the_first_round(self, tmp_path):
        app = hostile({"rank-pattern": '{"no.such.layer": 2}'})

        with pytest.raises(StrategyError, match=r"min_replies=5: only 4 of 4 .* 1 nodes are left"):
            run_tiny(tmp_path / "out", *ONE_ROUND, "federation.min_replies=5", app=app)

        assert not records_if_any(tmp_path / "out")


def records_if_any(folder):
    return records(folder, "client") if (folder / "metrics.jsonl").exists() else []


class TestLater:
    """The same of a node that comes when the run has begun."""

    class LateGrid(InProcessGrid):
        """The hostile node connects in the third round."""

        def __init__(self, *args):
            super().__init__(*args)
            self.trainings = 0

        def get_node_ids(self):
            here = self.trainings >= 2
            return [node_id for node_id in super().get_node_ids() if here or node_id != HOSTILE]

        def send_and_receive(self, messages, *, timeout=None):
            messages = list(messages)
            self.trainings += any(m.metadata.message_type == MessageType.TRAIN for m in messages)
            return super().send_and_receive(messages, timeout=timeout)

    def test_a_rank_pattern_of_another_model_leaves_it_out(self, tmp_path):
        app = hostile({"rank-pattern": '{"no.such.layer": 2}'})

        summary = run_tiny(
            tmp_path / "out",
            *("federation.num_rounds=4", "federation.start_timeout_s=0.5", "client.max_steps=1"),
            app=app,
            grid_type=self.LateGrid,
        )

        assert summary["rounds"] == 4
        assert "matches none" in left_out(summary)
        assert trained(tmp_path / "out") == {0, 1, 2, 3}


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def distance(one, other):
    return float(sum(torch.dist(one[name], other[name]).square() for name in one)) ** 0.5


class TestWeights:
    CLAIM = hostile({"num-examples": TRILLION}, {NUM_EXAMPLES: TRILLION})
    # lora_B alone moves in the first step from zero: a mean of few numbers, easy to compare.
    SETTINGS = (*ONE_ROUND, "strategy=fedit", "ranks=homogeneous", "federation.fraction_evaluate=1")

    def test_a_claim_of_a_trillion_examples_does_not_take_the_mean(self, tmp_path, caplog):
        bounded = ("federation.max_examples_per_node=40",)
        run_tiny(tmp_path / "honest", *self.SETTINGS, *bounded)
        run_tiny(tmp_path / "bounded", *self.SETTINGS, *bounded, app=self.CLAIM)
        free = "federation.max_examples_ratio=null"
        run_tiny(tmp_path / "free", *self.SETTINGS, free, app=self.CLAIM)

        honest, kept, taken = (adapter(tmp_path / n) for n in ("honest", "bounded", "free"))
        assert distance(kept, honest) < 0.2 * distance(taken, honest)
        assert f"40 of the {TRILLION} examples that it states count" in caplog.text

    def test_what_it_stated_and_what_counted_are_recorded(self, tmp_path):
        run_tiny(tmp_path / "out", *self.SETTINGS, app=self.CLAIM)

        clients = {c["partition_id"]: c for c in records(tmp_path / "out", "client")}
        honest = [c["num_examples"] for p, c in clients.items() if p != PARTITION]
        assert clients[PARTITION]["stated_examples"] == TRILLION
        assert clients[PARTITION]["num_examples"] <= 10 * max(honest)

    @pytest.mark.parametrize(
        "metrics", [{"accuracy": 1e9}, {"loss": -1e9}, {"loss": 1e200}, {"macro-f1": -0.5}]
    )
    def test_impossible_scores_choose_no_round(self, tmp_path, metrics):
        settings = (*self.SETTINGS, "federation.central_evaluation=false")

        summary = run_tiny(tmp_path / "out", *settings, app=hostile(metrics=metrics))

        assert 0 <= summary["final"]["clients/accuracy"] <= 1
        assert 0 < summary["final"]["clients/loss"] < 10


class TestQuarantine:
    class OtherIds(InProcessGrid):
        """The same nodes under other ids: the last partition is that of node 1."""

        def __init__(self, app, num_nodes, run_config):
            configs = [{"partition-id": p, "num-partitions": num_nodes} for p in range(num_nodes)]
            super().__init__(app, num_nodes, run_config, configs[::-1])

    RESTS = (
        "federation.quarantine.after=1",
        "federation.quarantine.rounds=9",
        "client.max_steps=1",
        "federation.fraction_evaluate=0",
    )

    def test_it_goes_with_the_node_when_a_run_is_resumed_under_other_ids(self, tmp_path):
        folder = tmp_path / "out"
        app = hostile(content=RecordDict())
        run_tiny(folder, *self.RESTS, app=app)
        assert asked(folder, 2) == {0, 1, 2, 3}  # node 5 rests, after one bad reply

        resumed = (*self.RESTS, "federation.num_rounds=3", f"resume={folder}")
        run_tiny(folder, *resumed, grid_type=self.OtherIds)

        assert asked(folder, 3) == {0, 1, 2, 3}


def asked(folder, server_round):
    lines = records(folder, "client")
    return {line["partition_id"] for line in lines if line["server_round"] == server_round}
