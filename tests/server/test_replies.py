"""Order of requests, polls and replies."""

import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from hafl_app.engines.in_process import InProcessGrid, server_identity
from hafl_app.server.replies import all_replies, replies_in_order

COUNT = 9


@pytest.fixture(autouse=True)
def _server():
    with server_identity():
        yield


def requests():
    return [Message(RecordDict(), node, MessageType.TRAIN) for node in range(1, COUNT + 1)]


class SlowGrid:
    """Nodes that answer one by one as time passes, in an order of their own."""

    def __init__(self, arrivals, lost=()):
        self.arrivals = list(arrivals)
        self.lost = set(lost)  # that never reach their node
        self.pushed, self.arrived, self.pulled, self.held = {}, set(), [], 0
        self.waves, self.pauses = [], []

    def push_messages(self, messages):
        ids = []
        self.waves.append([message.metadata.dst_node_id for message in messages])
        for message in messages:
            node = message.metadata.dst_node_id
            name = message.metadata.__dict__["_message_id"] = f"to {node}"
            self.pushed[name] = message
            ids.append(None if node in self.lost else name)
        return ids

    def pull_messages(self, message_ids):
        assert None not in message_ids
        found = [name for name in message_ids if name in self.arrived]
        self.pulled += found
        return [Message(RecordDict(), reply_to=self.pushed[name]) for name in found[::-1]]

    def pass_time(self, seconds):
        assert seconds >= 0
        self.pauses.append(seconds)
        if self.arrivals:
            self.arrived.add(f"to {self.arrivals.pop(0)}")


def nodes_of(replies):
    return [reply.metadata.src_node_id for reply in replies]


@pytest.mark.parametrize("buffer", [1, 2, 4, 100])
@pytest.mark.parametrize("arrivals", [[3, 9, 1, 8, 2, 7, 4, 6, 5], list(range(COUNT, 0, -1))])
def test_the_order_is_that_of_the_requests_whoever_comes_first(arrivals, buffer):
    grid = SlowGrid(arrivals)

    replies = replies_in_order(grid, requests(), 60.0, buffer, sleep=grid.pass_time)

    assert nodes_of(replies) == list(range(1, COUNT + 1))


@pytest.mark.parametrize("buffer", [1, 3])
def test_no_more_than_the_buffer_is_taken_from_flower_ahead_of_its_turn(buffer):
    grid = SlowGrid([9, 8, 7, 6, 5, 4, 3, 2, 1])

    for number, _ in enumerate(
        replies_in_order(grid, requests(), 60.0, buffer, sleep=grid.pass_time), 1
    ):
        assert len(grid.pulled) - (number - 1) <= buffer
        assert len(grid.pushed) == COUNT  # all nodes were asked before the first reply


def test_a_silent_node_costs_no_other_reply(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("hafl_app.server.replies.time.monotonic", lambda: next(clock))
    grid = SlowGrid([9, 8, 6, 5, 4, 3])

    replies = replies_in_order(grid, requests(), 30.0, 2, sleep=grid.pass_time)

    assert nodes_of(replies) == [3, 4, 5, 6, 8, 9]


def test_a_message_that_could_not_be_sent_is_not_waited_for():
    grid = SlowGrid([1, 3, 4, 5, 6, 7, 8, 9], lost=[2])

    replies = replies_in_order(grid, requests(), 60.0, 2, sleep=grid.pass_time)

    assert nodes_of(replies) == [1, 3, 4, 5, 6, 7, 8, 9]


def test_no_request_no_reply():
    assert list(replies_in_order(SlowGrid([]), [], 60.0, 2)) == []


def test_in_process_no_more_than_the_buffer_are_asked_ahead():
    app, trained = ClientApp(), []

    @app.train()
    def train(message, context):
        trained.append(context.node_id)
        return Message(RecordDict({"config": ConfigRecord()}), reply_to=message)

    grid = InProcessGrid(app, COUNT)
    for number, reply in enumerate(replies_in_order(grid, requests(), 60.0, 3), 1):
        assert reply.metadata.src_node_id == number
        assert len(trained) <= number - 1 + 3
    assert trained == list(range(1, COUNT + 1))


class TestAllAtOnce:
    def test_replies_are_returned_as_they_arrive(self):
        arrivals = [3, 9, 1, 8, 2, 7, 4, 6, 5]
        grid = SlowGrid(arrivals)

        replies = all_replies(grid, requests(), 60.0, sleep=grid.pass_time)

        assert nodes_of(replies) == arrivals
        assert grid.waves == [list(range(1, COUNT + 1))]

    def test_who_took_longest_and_who_is_not_known_is_asked_first(self):
        grid = SlowGrid(range(1, COUNT + 1))
        seconds = {1: 0.3, 2: 5.0, 3: 0.2, 5: 0.1, 6: 2.0, 7: 1.0, 8: 0.4, 9: 3.0}

        replies = all_replies(grid, requests(), 60.0, seconds, sleep=grid.pass_time)

        assert grid.waves == [[4, 2, 9, 6, 7], [8, 1, 3, 5]]
        assert grid.pauses[0] > 0.1  # Flower's Ray engine has taken up the first by then
        assert sorted(nodes_of(replies)) == list(range(1, COUNT + 1))

    @pytest.mark.parametrize("seconds", [{}, dict.fromkeys(range(1, COUNT + 1), 0.01), {3: 1.0}])
    def test_no_pause_for_clients_that_are_fast_or_unknown(self, seconds):
        grid = SlowGrid(range(1, COUNT + 1))

        all_replies(grid, requests(), 60.0, seconds, sleep=grid.pass_time)

        assert grid.waves == [list(range(1, COUNT + 1))]

    def test_a_silent_node_costs_the_time_out_and_no_more(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr("hafl_app.server.replies.time.monotonic", lambda: now[0])
        grid = SlowGrid([9, 8, 6, 5, 4, 3])

        def pass_time(seconds):
            now[0] += seconds
            grid.pass_time(seconds)

        replies = all_replies(grid, requests(), 30.0, sleep=pass_time)

        assert nodes_of(replies) == [9, 8, 6, 5, 4, 3]
        assert now[0] == pytest.approx(30.0)

    def test_what_arrives_in_the_last_pause_counts(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr("hafl_app.server.replies.time.monotonic", lambda: now[0])
        grid = SlowGrid([])

        def pass_time(seconds):
            now[0] += seconds
            if now[0] >= 30:
                grid.arrived.add("to 1")

        assert nodes_of(all_replies(grid, requests(), 30.0, sleep=pass_time)) == [1]

    def test_the_end_of_a_wait_is_found_within_a_hundredth_of_it(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr("hafl_app.server.replies.time.monotonic", lambda: now[0])
        waits = []

        def pass_time(seconds):
            waits.append((now[0], seconds))
            now[0] += seconds

        all_replies(SlowGrid([]), requests(), 600.0, sleep=pass_time)

        assert all(pause <= max(0.05, min(1.0, before / 100)) for before, pause in waits)
        assert len(waits) < 1500  # looking costs something too

    def test_a_message_that_could_not_be_sent_is_not_waited_for(self):
        grid = SlowGrid([1, 3, 4, 5, 6, 7, 8, 9], lost=[2])

        replies = all_replies(grid, requests(), 60.0, sleep=grid.pass_time)

        assert nodes_of(replies) == [1, 3, 4, 5, 6, 7, 8, 9]

    def test_no_request_no_reply(self):
        assert all_replies(SlowGrid([]), [], 60.0) == []
