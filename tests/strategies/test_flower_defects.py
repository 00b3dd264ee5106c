"""Bad replies under Flower 1.41's own FedAvg, and under this project.

When one of Flower's halves fails here, Flower has become better: drop that half.
"""

import inspect

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy
from running import records, run_tiny, tampering

from hafl_app.engines.in_process import server_identity
from hafl_app.server.rounds import RoundFailedError
from hafl_app.wire.records import METRICS, NUM_EXAMPLES, read_adapter

pytestmark = pytest.mark.slow  # whole federations


def fedavg(*clients: tuple[np.ndarray, int]) -> np.ndarray:
    """Let Flower average the arrays of some clients, given with their number of examples."""
    with server_identity():
        replies = []
        for node_id, (array, num_examples) in enumerate(clients, start=1):
            content = RecordDict(
                {
                    "arrays": ArrayRecord({"lora_A": Array(array.astype(np.float32))}),
                    "metrics": MetricRecord({"num-examples": num_examples}),
                }
            )
            request = Message(RecordDict(), node_id, "train")
            request.metadata.__dict__["_message_id"] = str(node_id)
            replies.append(Message(content, reply_to=request))
        arrays, _ = FedAvg().aggregate_train(1, replies)
    assert arrays is not None
    return arrays["lora_A"].numpy()


def ours(tmp_path, change, *overrides: str) -> list[str]:
    """Run a federation in which client 2 misbehaves in round 1; return why its reply is refused."""

    def tamper(request, reply):
        bad = request.metadata.dst_node_id == 3
        return change(request, reply) if bad else reply

    run_tiny(tmp_path / "out", "federation.num_rounds=1", *overrides, app=tampering(tamper))
    told = {c["partition_id"]: c["error"] for c in records(tmp_path / "out", "client")}
    assert [p for p, error in told.items() if error] in ([], [2])
    return told[2]


def repacked(change):
    """Return a tampering that changes the factors of every module of a reply."""

    def tamper(request, reply):
        from hafl_app.wire.records import AdapterArrays, adapter_content

        adapter = read_adapter(reply.content)
        modules = {name: change(*factors) for name, factors in adapter.modules.items()}
        arrays = AdapterArrays(modules, adapter.head, adapter.importance)
        metrics = reply.content.metric_records[METRICS]
        return Message(adapter_content(arrays, **{METRICS: metrics}), reply_to=request)

    return tamper


class TestRankOneAmongHigherRanks:
    def test_flower_broadcasts_it(self):
        averaged = fedavg((np.full((4, 3), 2.0), 1), (np.array([[1.0, 2.0, 3.0]]), 1))

        # Four rows out of one: no client of rank 4 ever trained this.
        np.testing.assert_allclose(averaged, np.tile([1.5, 2.0, 2.5], (4, 1)))

    def test_ours_refuses_it(self, tmp_path):
        error = ours(tmp_path, repacked(lambda a, b: (a[:1], b[:, :1])))

        assert "rank 1, expected" in error


class TestAnotherRank:
    def test_flower_dies_of_it(self):
        with pytest.raises(ValueError, match="broadcast"):
            fedavg((np.ones((4, 3)), 1), (np.ones((2, 3)), 1))

    def test_ours_goes_on_without_it(self, tmp_path):
        error = ours(tmp_path, repacked(lambda a, b: (a[:-1], b[:, :-1])))

        assert "expected" in error


class TestNotANumber:
    def test_flower_lets_it_poison_the_adapter(self):
        poisoned = np.ones((4, 3))
        poisoned[1, 2] = np.nan

        assert np.isnan(fedavg((np.ones((4, 3)), 99), (poisoned, 1))).any()

    def test_ours_refuses_it(self, tmp_path):
        error = ours(tmp_path, repacked(lambda a, b: (a * np.float32("nan"), b)))

        assert "not finite" in error


class TestNoExamples:
    @staticmethod
    def claim_none(request, reply):
        reply.content.metric_records[METRICS][NUM_EXAMPLES] = 0
        return reply

    def test_flower_divides_by_zero(self):
        with pytest.raises(ZeroDivisionError):
            fedavg((np.ones((4, 3)), 0), (np.ones((4, 3)), 0))

    def test_ours_refuses_it(self, tmp_path):
        assert "num-examples" in ours(tmp_path, self.claim_none)

    def test_ours_reports_it_if_no_client_has_any(self, tmp_path):
        with pytest.raises(RoundFailedError, match="round 1: the replies of 0 of 5 clients count"):
            run_tiny(tmp_path / "out", app=tampering(self.claim_none))


class TestResume:
    def test_flower_can_only_begin_at_the_first_round(self):
        names = inspect.signature(Strategy.start).parameters

        words = ("first", "start", "resume")
        assert not [name for name in names if any(word in name for word in words)]

    def test_ours_goes_on(self, tmp_path):
        folder = tmp_path / "out"
        run_tiny(folder, "federation.num_rounds=1")

        run_tiny(folder, "federation.num_rounds=2", f"resume={folder}")

        assert [r["server_round"] for r in records(folder, "round")] == [0, 1, 2]


def test_flower_runs_on_without_a_single_good_reply_and_ours_does_not(tmp_path):
    def fail(request, reply):
        from flwr.app import Error

        return Message(Error(0, "broken"), reply_to=request)

    with server_identity():
        arrays, metrics = FedAvg().aggregate_train(1, [])
    assert arrays is None
    assert metrics is None  # Flower's loop keeps the old arrays and completes

    with pytest.raises(RoundFailedError):
        run_tiny(tmp_path / "out", app=tampering(fail))
