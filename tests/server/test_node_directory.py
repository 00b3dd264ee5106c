from itertools import pairwise

import pytest
from fake_grid import SILENT, FakeGrid

from hafl_app.engines.in_process import server_identity
from hafl_app.server import node_directory as directory_module
from hafl_app.server import node_queries as questions_module
from hafl_app.server.node_directory import NodeDirectory
from hafl_app.server.node_queries import PendingQueries
from hafl_app.wire.node_profile import NodeProfile


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        for module in (directory_module, questions_module):
            monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
            monkeypatch.setattr(module.time, "sleep", self.advance)

    def advance(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    with server_identity():
        yield Clock(monkeypatch)


def directory_at(clock, timeout_s=3600.0, **settings):
    directory = NodeDirectory(timeout_s, **settings)
    directory._queries = PendingQueries(lambda: clock.now)
    return directory


def placed(partition_id, num_partitions=3, rank=2):
    return NodeProfile(partition_id, num_partitions, rank, 5 + partition_id, "cpu")


def ids(profiles):
    return [profile.node_id for profile in profiles]


class TestJoining:
    def test_a_node_that_appears_later_is_asked_once_and_takes_part(self, clock):
        grid, directory = FakeGrid(n11=placed(0, 2), n12=placed(1, 2)), directory_at(clock)
        assert ids(directory.wait_for_all(grid)) == [11, 12]

        grid.join(n13=placed(2))
        seen = [ids(directory.refresh(grid)) for _ in range(3)]

        assert seen == [[11, 12, 13]] * 3
        assert grid.asked() == [11, 12, 13]
        assert clock.now == 1000.0  # without waiting

    def test_a_node_that_is_gone_is_not_among_those_present(self, clock):
        grid, directory = FakeGrid(n11=placed(0, 2), n12=placed(1, 2)), directory_at(clock)
        directory.wait_for_all(grid)
        back = grid.nodes.pop(11)

        assert ids(directory.refresh(grid)) == [12]
        grid.nodes[11] = back
        assert ids(directory.refresh(grid)) == [11, 12]

    def test_a_slow_answer_counts_from_when_it_comes(self, clock):
        grid, directory = FakeGrid(n11=placed(0, 1)), directory_at(clock)
        directory.wait_for_all(grid)
        grid.join(n12=SILENT)

        assert ids(directory.refresh(grid)) == [11]
        grid.nodes[12] = placed(1)
        assert ids(directory.refresh(grid)) == [11, 12]
        assert grid.asked() == [11, 12]


class TestSilence:
    def test_it_costs_a_few_seconds_once_and_nothing_afterwards(self, clock):
        grid, directory = FakeGrid(n11=placed(0, 1)), directory_at(clock)
        directory.wait_for_all(grid)
        grid.join(n12=SILENT)

        spent = []
        for _ in range(50):
            before = clock.now
            assert ids(directory.refresh(grid)) == [11]
            spent.append(clock.now - before)
            clock.advance(20.0)  # the round itself

        assert spent[0] == pytest.approx(5.0, abs=0.3)
        assert spent[1:] == [0.0] * 49

    def test_it_is_asked_again_after_growing_pauses(self, clock):
        grid, directory = FakeGrid(n11=placed(0, 1), n12=SILENT), directory_at(clock)
        asked_at = []
        for _ in range(1500):
            before = len(grid.queries)
            directory.refresh(grid)
            if 12 in grid.asked()[before:]:
                asked_at.append(clock.now)
            clock.advance(10.0)

        pauses = [later - earlier for earlier, later in pairwise(asked_at)]
        assert pauses[:6] == pytest.approx([60, 120, 240, 480, 960, 1920], abs=20)
        assert pauses[6:] == pytest.approx([3600] * len(pauses[6:]), abs=20)
        assert len(pauses) > 7

    def test_an_answer_to_an_earlier_question_counts(self, clock):
        grid, directory = FakeGrid(n11=placed(0, 1), n12=SILENT), directory_at(clock)
        directory.refresh(grid)
        clock.advance(100.0)
        directory.refresh(grid)  # asks node 12 a second time
        assert grid.asked() == [11, 12, 12]

        grid.nodes[12] = placed(1)

        assert ids(directory.refresh(grid)) == [11, 12]
        assert ids(directory.refresh(grid)) == [11, 12]

    def test_the_only_nodes_are_waited_for_longer(self, clock):
        grid, directory = FakeGrid(n12=SILENT), directory_at(clock, timeout_s=90.0)

        assert directory.refresh(grid) == []
        assert clock.now - 1000.0 == pytest.approx(90.0, abs=0.5)
        assert grid.asked() == [12, 12]  # again after a minute

    def test_one_answer_ends_the_longer_wait(self, clock):
        grid, directory = FakeGrid(n11=placed(0, 1), n12=SILENT), directory_at(clock)

        assert ids(directory.refresh(grid)) == [11]
        assert clock.now - 1000.0 == pytest.approx(5.0, abs=0.3)

    def test_the_start_goes_on_without_it_when_its_time_is_over(self, clock):
        grid = FakeGrid(n11=placed(0), n12=placed(1), n13=SILENT)
        directory = directory_at(clock, start_timeout_s=50.0)

        assert ids(directory.wait_for_all(grid)) == [11, 12]
        assert clock.now - 1000.0 == pytest.approx(50.0, abs=1.0)
        assert grid.asked() == [11, 12, 13]

    def test_the_start_waits_no_longer_than_for_the_last_answer(self, clock, monkeypatch):
        grid = FakeGrid(n11=placed(0, 2), n12=SILENT)

        def wake(seconds):
            clock.now += seconds
            if clock.now > 1040:
                grid.nodes[12] = placed(1, 2)

        monkeypatch.setattr(questions_module.time, "sleep", wake)

        assert ids(directory_at(clock).wait_for_all(grid)) == [11, 12]
        assert clock.now == pytest.approx(1040, abs=1.0)


class TestRefusals:
    def test_a_refused_node_is_asked_again_and_its_reason_logged_once(self, clock, caplog):
        grid, directory = FakeGrid(n11=placed(0, 1), n12="no data"), directory_at(clock)

        for _ in range(3):
            assert ids(directory.refresh(grid)) == [11]
        grid.nodes[12] = placed(1)

        assert ids(directory.refresh(grid)) == [11, 12]
        assert directory.refusals == {}
        assert grid.asked().count(12) == 4
        assert sum("no data" in record.message for record in caplog.records) == 1

    def test_another_node_cannot_answer_for_a_node(self, clock):
        class Meddling(FakeGrid):
            def pull_messages(self, message_ids):
                replies = super().pull_messages(message_ids)
                for reply in replies:
                    reply.metadata.__dict__["_reply_to_message_id"] = "of another question"
                return replies

        assert directory_at(clock, timeout_s=1.0).refresh(Meddling(n11=placed(0, 1))) == []

    def test_a_reply_is_of_the_node_that_was_asked(self, clock):
        class Posing(FakeGrid):
            def pull_messages(self, message_ids):
                replies = super().pull_messages(message_ids)
                for reply in replies:
                    reply.metadata.__dict__["_src_node_id"] = 11
                return replies

        grid = Posing(n11=placed(0), n12=placed(1))
        assert ids(directory_at(clock, timeout_s=1.0).refresh(grid)) == [11, 12]

    def test_what_one_says_of_the_number_of_partitions_makes_nobody_wait(self, clock):
        grid = FakeGrid(n11=placed(0), n12=placed(1), n13=placed(2, 10**9))

        assert ids(directory_at(clock).wait_for_all(grid)) == [11, 12, 13]
        assert clock.now == 1000.0


class TestOnePartitionOneNode:
    def test_the_second_node_of_a_partition_is_left_out_by_name(self, clock):
        grid, directory = FakeGrid(n11=placed(0, 2), n12=placed(0, 2)), directory_at(clock)

        assert ids(directory.wait_for_all(grid)) == [11]
        assert directory.refusals == {12: "partition-id 0 is node 11's"}

    def test_a_node_that_restarts_under_another_id_gets_its_partition_back(self, clock):
        grid = FakeGrid(n11=placed(0, 2), n12=placed(1, 2))
        directory = directory_at(clock)
        directory.wait_for_all(grid)

        del grid.nodes[11]
        grid.join(n13=placed(0, 2))

        assert ids(directory.refresh(grid)) == [13, 12]
        assert ids(directory.in_order()) == [13, 12]  # the old one is counted no longer

    def test_a_kept_partition_waits_for_its_node(self, clock):
        grid = FakeGrid(n11=placed(0, 2), n12=placed(1, 2))
        directory = directory_at(clock, keeps_partitions=True)
        directory.wait_for_all(grid)

        back = grid.nodes.pop(11)
        grid.join(n13=placed(0, 2))
        assert ids(directory.refresh(grid)) == [12]
        assert directory.refusals == {13: "partition-id 0 is node 11's"}

        grid.nodes[11] = back
        assert ids(directory.refresh(grid)) == [11, 12]

    def test_a_reason_of_megabytes_is_one_short_line(self, clock):
        grid = FakeGrid(n11=placed(0, 1), n12="\x1b[2Jforged\nline " * 300_000)
        directory = directory_at(clock)

        directory.wait_for_all(grid)

        reason = directory.refusals[12]
        assert len(reason) < 400
        assert reason.startswith("\\x1b[2Jforged line")
