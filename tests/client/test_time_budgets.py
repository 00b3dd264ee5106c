"""Slow clients and silent ones: what a round waits for, and what it does not."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from flwr.app import MessageType
from running import records, run_tiny

from hafl_app.engines.in_process import InProcessGrid
from hafl_app.training.classifier import LoraClassifier

pytestmark = pytest.mark.slow

SLOW_NODE, SILENT_NODE, STEP_SECONDS, TIMEOUT = 5, 2, 0.8, 6.0
ONE_ROUND = (
    "federation.num_rounds=1",
    "federation.fraction_evaluate=0",
    "federation.alone_clients_per_rank=0",
    f"federation.round_timeout_s={TIMEOUT}",
    "client.batch_size=4",
    "client.local_epochs=2",  # of about six steps
)

_OVER = threading.Event()  # the round, for the server

PRIVATE = ("privacy=local_dp", "strategy=zero_padding")


class PunctualGrid(InProcessGrid):
    """Nodes answer in a thread, and the server waits for them no longer than the time-out."""

    silent: tuple[int, ...] = ()

    def __init__(self, *args):
        super().__init__(*args)
        self._thread = ThreadPoolExecutor(max_workers=1)  # they share one resident model

    def push_messages(self, messages):
        message_ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message_id = f"message {id(message)}"
            training = message.metadata.message_type == MessageType.TRAIN
            if not (training and message.metadata.dst_node_id in self.silent):
                self._thread.submit(self._keep, message_id, message)
            message_ids.append(message_id)
        return message_ids

    def _keep(self, message_id, message):
        threading.current_thread().name = f"node {message.metadata.dst_node_id}"
        self._replies[message_id] = self._answer(message)

    def send_and_receive(self, messages, *, timeout=None):
        waiting = set(self.push_messages(list(messages)))
        end, replies = time.monotonic() + timeout, []
        while waiting and time.monotonic() < end:
            replies += (new := list(self.pull_messages(waiting)))
            waiting -= {reply.metadata.reply_to_message_id for reply in new}
            time.sleep(0.02)
        _OVER.set()  # whoever is late hurries now
        self._thread.shutdown()  # the next test has the same model
        return replies


class SilentGrid(PunctualGrid):
    silent = (SILENT_NODE,)


class LimitedGrid(PunctualGrid):
    """The operator of the slow node knows that it is slow."""

    def __init__(self, *args):
        super().__init__(*args)
        self._contexts[SLOW_NODE].node_config["max-seconds"] = 1.5


@pytest.fixture
def slow_node(monkeypatch):
    _OVER.clear()
    forward = LoraClassifier.forward

    def slow(classifier, *inputs):
        if threading.current_thread().name == f"node {SLOW_NODE}":
            _OVER.wait(STEP_SECONDS)
        return forward(classifier, *inputs)

    monkeypatch.setattr(LoraClassifier, "forward", slow)


def outcome(folder):
    """Return the round's replies, failures and seconds, and the clients by node."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (end,) = (line for line in lines if line["kind"] == "round" and line["server_round"] == 1)
    clients = {line["node_id"]: line for line in lines if line["kind"] == "client"}
    return end["replies"], end["failures"], end["seconds"], clients


def test_a_client_that_never_answers_costs_the_time_out_and_no_more(tmp_path):
    run_tiny(tmp_path / "a", *ONE_ROUND, grid_type=SilentGrid)

    replies, failures, seconds, clients = outcome(tmp_path / "a")
    assert (replies, failures) == (4, 1)
    assert clients[SILENT_NODE]["error"] == "no reply in time"
    assert TIMEOUT <= seconds < TIMEOUT + 4


def test_a_slow_client_is_late(tmp_path, slow_node):
    run_tiny(tmp_path / "a", *ONE_ROUND, grid_type=PunctualGrid)

    replies, failures, _, clients = outcome(tmp_path / "a")
    assert (replies, failures) == (4, 1)
    assert clients[SLOW_NODE]["error"] == "no reply in time"


def test_with_a_time_budget_it_trains_less_instead(tmp_path, slow_node, capsys):
    run_tiny(tmp_path / "a", *ONE_ROUND, grid_type=LimitedGrid)

    replies, failures, _, clients = outcome(tmp_path / "a")
    assert (replies, failures) == (5, 0)
    slow = clients.pop(SLOW_NODE)
    assert slow["out_of_time"]
    assert 1 <= slow["steps"] <= 3
    assert all(one["steps"] > 8 and not one["out_of_time"] for one in clients.values())
    # Its weight is its data, which the judge compares with what it said to have.
    assert slow["num_examples"] in (25, 26)  # (160 - 16) / 5, less a tenth that it keeps aside
    assert "1 stopped by their time" in capsys.readouterr().out


def test_the_runs_own_limit_does_the_same(tmp_path, slow_node):
    run_tiny(tmp_path / "a", *ONE_ROUND, "client.max_seconds=1.5", grid_type=PunctualGrid)

    replies, failures, _, clients = outcome(tmp_path / "a")
    assert (replies, failures) == (5, 0)
    assert clients[SLOW_NODE]["out_of_time"]


def test_steps_of_a_node_are_limited(tmp_path):
    class FewSteps(InProcessGrid):
        def __init__(self, *args):
            super().__init__(*args)
            self._contexts[3].node_config["max-steps"] = 2

    run_tiny(tmp_path / "a", *ONE_ROUND, grid_type=FewSteps)

    steps = {c["node_id"]: c["steps"] for c in records(tmp_path / "a", "client")}
    assert steps.pop(3) == 2
    assert min(steps.values()) > 8


def test_under_local_privacy_nobody_is_told_that_time_was_over(tmp_path, slow_node):
    run_tiny(tmp_path / "a", *ONE_ROUND, *PRIVATE, grid_type=LimitedGrid)

    replies, _, _, clients = outcome(tmp_path / "a")
    assert replies == 5
    assert not any(one["out_of_time"] or one["steps"] for one in clients.values())
