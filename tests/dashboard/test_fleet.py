"""Rows of the fleet: joined from clients, records and what the fence says."""

import pytest
from run_folders import NODE_IDS, client_record

from hafl_app.dashboard.fleet import fleet, note
from hafl_app.dashboard.runs import Run

NOW = 10_000.0
CLIENTS = {
    "clients": [
        {"node_id": node_id, "partition_id": i, "rank": 2 << i, "examples": 9, "device": f"gpu {i}"}
        for i, node_id in enumerate(NODE_IDS)
    ],
    "left_out": {"1004": "it has no label"},
}


def seen(node_id=NODE_IDS[0], ago=1.0, **changes):
    return {
        "node_id": node_id,
        "name": "phone",
        "connected": True,
        "last_call": NOW - ago,
        "call": "pull-messages",
        "closed": None,
    } | changes


def watched(*nodes, ago=1.0):
    return {"written": NOW - ago, "nodes": list(nodes)}


def rows(said=None, **run):
    return fleet(Run("run", "running", **({"clients": CLIENTS} | run)), said or {}, NOW)


class TestRows:
    def test_clients_and_their_trainings_are_joined(self):
        trainings = [
            client_record(1, 0),
            client_record(2, 0, error="out of memory"),
            client_record(3, 0),
            client_record(2, 1),
        ]
        first, second, third, left_out = rows(trainings=trainings)
        assert (first.node_id, first.partition_id, first.rank, first.device) == (
            1001,
            0,
            2,
            "gpu 0",
        )
        assert (first.trainings, first.failures) == (3, 1)
        assert first.last_error == "round 2: out of memory"
        assert first.last_seen == "reply of round 3"
        assert (first.bytes_down, first.bytes_up) == (3_000_000, 900_000)
        assert (second.trainings, second.bytes_up) == (1, 600_000)
        assert (third.trainings, third.last_seen) == (0, "")
        assert (left_out.node_id, left_out.left_out) == (1004, "it has no label")

    def test_a_run_of_an_older_app_has_its_records_alone(self):
        (only,) = rows(clients={}, trainings=[client_record(1, 2)])
        assert (only.node_id, only.partition_id, only.rank, only.device) == (1003, 2, 8, "")

    def test_a_node_that_has_not_joined_is_known_to_the_fence(self):
        *_, last = rows(watched(seen(2000)))
        assert (last.node_id, last.name, last.partition_id) == (2000, "phone", None)

    @pytest.mark.parametrize("odd", [None, 1, "x", [1, None, {}], {"a": 1}])
    def test_odd_values_make_no_row(self, odd):
        assert rows({"written": NOW, "nodes": odd}, clients={"clients": odd, "left_out": odd}) == []


class TestState:
    @pytest.mark.parametrize(
        ("said", "state"),
        [
            (seen(), "online"),
            (seen(ago=27), "online"),  # it trains: a heartbeat is all that it says
            (seen(ago=41), "silent"),
            (seen(connected=False, closed=NOW - 1), "online"),  # its next connection may come
            (seen(ago=20, connected=False, closed=NOW - 4.5), "gone"),
            (seen(ago=4.5, connected=False, closed=NOW - 20), "gone"),
            (seen(ago=60, connected=False, closed=NOW - 58), "gone"),  # and stays so
            (seen(ago=20, connected=False), "online"),  # its first call is going on
            (seen(call="deactivate-node", connected=False, closed=NOW - 9), "left"),
            (seen(last_call=None), "unknown"),
            (seen(last_call="soon"), "unknown"),
        ],
    )
    def test_it_follows_calls_and_connections(self, said, state):
        assert rows(watched(said))[0].state == state

    def test_when_it_was_last_seen_is_in_words(self):
        assert rows(watched(seen(ago=3.2)))[0].last_seen == "3 s ago"
        assert rows(watched(seen(ago=75)))[0].last_seen == "1 min 15 s ago"

    def test_a_fence_that_says_nothing_any_more_is_not_believed(self):
        said = watched(seen(), ago=11)
        assert rows(said)[0].state == "unknown"
        assert note(said, NOW) == (
            "The fence has not said anything for 11 s: it is not known who is online."
        )

    def test_without_a_fence_nobody_watches(self):
        assert {node.state for node in rows()} == {"unknown"}
        assert note({}, NOW) == note(watched(), NOW) == ""
