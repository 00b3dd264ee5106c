"""Nodes with data of their own: their numbers, their classes, and how long they are waited for."""

import json

import pytest
from fake_grid import FakeGrid
from flwr.app import ConfigRecord, MessageType

from hafl_app.engines.in_process import server_identity
from hafl_app.server.node_directory import NodeDirectory
from hafl_app.server.numbering import Numbering
from hafl_app.wire.node_profile import UNNUMBERED, NodeProfile
from hafl_app.wire.records import CONFIG, LABEL_NAMES


def own(*label_names, rank=2, num_examples=9):
    return NodeProfile(
        UNNUMBERED, 0, rank, num_examples, "cpu", own_data=True, label_names=label_names
    )


def placed(partition_id, num_partitions):
    return NodeProfile(partition_id, num_partitions, 3, 5, "cpu")


@pytest.fixture(autouse=True)
def identity():
    with server_identity():
        yield


def numbers(profiles):
    return {p.node_id: p.partition_id for p in profiles}


class TestNumbers:
    def test_they_follow_the_node_ids_and_stay(self):
        grid = FakeGrid(n70=own(), n8=own(), n300=own())
        directory = NodeDirectory(1.0, num_nodes=3)

        assert numbers(directory.wait_for_all(grid)) == {8: 0, 70: 1, 300: 2}
        grid.join(n5=own())
        assert numbers(directory.refresh(grid)) == {8: 0, 70: 1, 300: 2, 5: 3}

    def test_who_answers_first_does_not_decide(self):
        grid = FakeGrid(n70=own())
        late = iter([{}, {"n300": own()}, {"n8": own()}])
        connected = grid.get_node_ids
        grid.get_node_ids = lambda: grid.join(**next(late, {})) or connected()

        assert numbers(NodeDirectory(1.0, num_nodes=3).wait_for_all(grid)) == {8: 0, 70: 1, 300: 2}

    def test_they_start_above_all_partitions_that_nodes_speak_of(self):
        grid = FakeGrid(n9=own(), n2=placed(1, 4), n3=placed(0, 4))

        assert numbers(NodeDirectory(1.0).refresh(grid)) == {9: 4, 2: 1, 3: 0}

    def test_a_partition_whose_number_was_given_away_is_left_out(self):
        grid = FakeGrid(n9=own())
        directory = NodeDirectory(1.0)
        directory.refresh(grid)
        grid.join(n2=placed(0, 4), n3=placed(2, 4))

        assert numbers(directory.refresh(grid)) == {9: 0, 3: 2}
        assert directory.refusals == {2: "partition-id 0 is another node's number"}

    def test_a_run_that_goes_on_knows_them_again(self):
        first = NodeDirectory(1.0)
        first.refresh(FakeGrid(n5=own(), n8=own()))

        kept = json.loads(json.dumps(first.numbering.to_json()))
        again = NodeDirectory(1.0, numbering=Numbering.from_json(kept))

        assert numbers(again.refresh(FakeGrid(n1=own(), n8=own()))) == {8: 1, 1: 2}


class TestWaiting:
    def test_a_node_that_cannot_take_part_is_not_waited_for(self, caplog):
        grid = FakeGrid(n1=own(), n2="no data", n3=own())
        directory = NodeDirectory(2.0, num_nodes=3)

        assert numbers(directory.wait_for_all(grid)) == {1: 0, 3: 1}
        assert directory.refusals == {2: "no data"}
        assert "nodes are here" not in caplog.text

    def test_missing_nodes_are_waited_for_until_the_start_time_out(self, caplog):
        directory = NodeDirectory(60.0, start_timeout_s=0.01, num_nodes=3)

        assert len(directory.wait_for_all(FakeGrid(n1=own()))) == 1
        assert "only 1 of 3 nodes are here" in caplog.text

    def test_they_are_taken_as_soon_as_all_are_there(self, caplog):
        grid = FakeGrid(n1=own())
        late = iter([{}, {"n2": own()}, {"n3": own()}])
        connected = grid.get_node_ids
        grid.get_node_ids = lambda: grid.join(**next(late)) or connected()

        assert len(NodeDirectory(60.0, num_nodes=3).wait_for_all(grid)) == 3
        assert not caplog.records

    def test_without_own_data_the_nodes_know_how_many_they_are(self):
        directory = NodeDirectory(60.0, num_nodes=99)

        assert len(directory.wait_for_all(FakeGrid(n1=placed(0, 2), n2=placed(1, 2)))) == 2


class TestClasses:
    def test_nodes_send_theirs(self):
        (profile,) = NodeDirectory(1.0).refresh(FakeGrid(n1=own("b", "a c")))

        assert profile.label_names == ("b", "a c")
        assert profile.own_data

    def test_a_query_says_the_runs_once_they_are_agreed(self):
        grid = FakeGrid(n1=own("a", "b"))
        directory = NodeDirectory(1.0)
        directory.refresh(grid)
        directory.label_names = ("a", "b")
        grid.join(n2=own())
        directory.refresh(grid)

        first, second = (query.content for query in grid.queries)
        assert CONFIG not in first
        assert second[CONFIG] == ConfigRecord({LABEL_NAMES: ["a", "b"]})
        assert {q.metadata.message_type for q in grid.queries} == {MessageType.QUERY}


class TestUnknownNodes:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"label-names": ["a"] * 2}, "repeated"),
            ({"label-names": [str(i) for i in range(10_001)]}, "10001 label names"),
            ({"label-names": ["x" * 201]}, "201 characters"),
            ({"label-names": ["a\nb"]}, "control"),
            ({"label-names": [1, 2]}, "not text"),
            ({"label-names": "ab"}, "expected a list"),
            ({"own-data": 1}, "not a node profile"),
            ({"own-data": 1, "partition-id": 0, "num-partitions": 1}, "own_data is 1"),
            ({"own-data": False}, "not a node profile"),
            ({"own-data": False, "partition-id": -1, "num-partitions": 0}, "partition_id is -1"),
            ({"partition-id": 3, "num-partitions": 3}, "expected below num_partitions, 3"),
            ({"partition-id": 3, "num-partitions": 2**62}, "at most 1000000000"),
            ({"partition-id": -1, "num-partitions": "x"}, "partition_id is -1"),
            ({"partition-id": -1, "num-partitions": 5}, "partition_id is -1"),
            ({"rank": 0}, "rank is 0"),
        ],
    )
    def test_odd_profiles_are_left_out(self, change, words):
        record = ConfigRecord({**own("a", "b").to_record(), **change})
        directory = NodeDirectory(1.0)

        assert [p.node_id for p in directory.refresh(FakeGrid(n1=record, n2=own()))] == [2]
        assert words in directory.refusals[1]
        assert len(directory.refusals[1]) < 400
