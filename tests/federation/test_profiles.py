from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from fake_grid import SILENT, FakeGrid
from flwr.app import Message, MessageType, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from hafl_app.federation import profiles as profiles_module
from hafl_app.federation import questions as questions_module
from hafl_app.federation.inprocess import server_identity
from hafl_app.federation.profiles import PROFILE, NodeDirectory, NodeProfile, scale_tiers
from hafl_app.federation.questions import Questions
from hafl_app.federation.sampling import client_seed, sample_profiles

HAFLQ = [(2, 3), (4, 3), (8, 4)]


class TestScaleTiers:
    def test_the_papers_table(self):
        # HAFLQ, section VII: clients 0-2 rank 2, 3-5 rank 4, 6-9 rank 8.
        assert scale_tiers(HAFLQ, 10) == [2, 2, 2, 4, 4, 4, 8, 8, 8, 8]

    def test_eight_clients_keep_three_tiers(self):
        assert scale_tiers(HAFLQ, 8) == [2, 2, 2, 4, 4, 8, 8, 8]

    @given(st.integers(1, 200))
    def test_everybody_gets_a_rank_near_its_share(self, clients):
        counts = Counter(scale_tiers(HAFLQ, clients))
        assert sum(counts.values()) == clients
        assert all(abs(counts.get(r, 0) - share / 10 * clients) < 1 for r, share in HAFLQ)

    @pytest.mark.parametrize("tiers", [[], [(2, 0)], [(2, -1.0)]])
    def test_bad_tiers_are_refused(self, tiers):
        with pytest.raises(ValueError, match="tiers"):
            scale_tiers(tiers, 3)


def profiles(node_ids):
    return [NodeProfile(i, len(node_ids), 2, 10, "cpu", node) for i, node in enumerate(node_ids)]


class TestSampling:
    def test_node_ids_do_not_matter(self):
        first = sample_profiles(profiles(range(20)), 0.3, 5, 2, "train")
        second = sample_profiles(profiles(range(900, 880, -1))[::-1], 0.3, 5, 2, "train")
        assert [p.partition_id for p in first] == [p.partition_id for p in second]
        assert len(first) == 6

    def test_rounds_phases_and_seeds_differ(self):
        drawn = {
            tuple(p.partition_id for p in sample_profiles(profiles(range(30)), 0.3, s, r, phase))
            for s, r, phase in [
                (1, 1, "train"),
                (2, 1, "train"),
                (1, 2, "train"),
                (1, 1, "evaluate"),
            ]
        }
        assert len(drawn) == 4

    def test_the_drawing_is_pinned(self):
        # Another Python or another order would silently change every result.
        drawn = sample_profiles(profiles(range(10)), 0.4, 0, 1, "train")
        assert [p.partition_id for p in drawn] == [2, 3, 4, 7]

    def test_at_least_one_unless_nobody_is_wanted(self):
        assert len(sample_profiles(profiles(range(3)), 0.01, 0, 1, "train")) == 1
        assert sample_profiles(profiles(range(3)), 0.0, 0, 1, "train") == []

    def test_client_seeds_differ(self):
        assert len({client_seed(s, r, p) for s in (0, 1) for r in (1, 2) for p in (0, 1)}) == 8


GPU = NodeProfile(
    1,
    4,
    16,
    250,
    "cuda",
    77,
    {"output.dense": 4},
    device_name="NVIDIA L4",
    memory_total_mb=23_034,
    memory_free_mb=21_500,
    torch_version="2.13.0+cu128",
    cuda_version="12.8",
)


def reply_of(record, node_id=77):
    with server_identity():
        query = Message(RecordDict(), node_id, MessageType.QUERY)
        return Message(RecordDict({PROFILE: record}), reply_to=query)


class TestWire:
    def test_every_fact_arrives(self):
        assert NodeProfile.from_reply(reply_of(GPU.to_record())) == GPU

    def test_a_node_may_leave_out_what_its_device_is(self):
        record = NodeProfile(0, 2, 4, 9, "cpu").to_record()
        for key in ("device-name", "memory-total-mb", "memory-free-mb", "torch-version"):
            del record[key]

        assert NodeProfile.from_reply(reply_of(record)).memory_free_mb == 0

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("rank", 2**16 + 1),
            ("rank", 2.0),
            ("num-examples", -1),
            ("num-examples", 10**13),
            ("memory-total-mb", -5),
            ("memory-free-mb", 10**10),
            ("memory-free-mb", 1.5),
            ("memory-free-mb", "much"),
            ("device", 3),
            ("device", "cpu" * 40),
            ("device-name", "A100\nround 1/10  val 99.9%"),
            ("device-name", "\x1b[2J"),
            ("torch-version", b"2.13"),
            ("cuda-version", ["12"]),
            ("rank-pattern", '{"query": 70000}'),
        ],
    )
    def test_a_stranger_cannot_say_anything(self, key, value):
        record = GPU.to_record()
        record[key] = value

        with pytest.raises(ValueError, match=r"node profile: |rank pattern") as caught:
            NodeProfile.from_reply(reply_of(record))

        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300

    def test_the_device_in_a_few_words(self):
        assert GPU.device_line == "NVIDIA L4, 21.5 GB free"
        cpu = replace(GPU, device="cpu", device_name="Some(R) CPU @ 2.20GHz", memory_free_mb=640)
        assert cpu.device_line == "cpu, 0.6 GB free"
        assert NodeProfile(0, 2, 4, 9, "cpu").device_line == "cpu"


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        for module in (profiles_module, questions_module):
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
    directory._questions = Questions(lambda: clock.now)
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
        assert clock.now == 1000.0  # nobody waited

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

    def test_nobody_else_there_is_waited_for_longer(self, clock):
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
    def test_a_refused_node_is_asked_again_and_its_reason_told_once(self, clock, caplog):
        grid, directory = FakeGrid(n11=placed(0, 1), n12="no data"), directory_at(clock)

        for _ in range(3):
            assert ids(directory.refresh(grid)) == [11]
        grid.nodes[12] = placed(1)

        assert ids(directory.refresh(grid)) == [11, 12]
        assert directory.refusals == {}
        assert grid.asked().count(12) == 4
        assert sum("no data" in record.message for record in caplog.records) == 1

    def test_a_stranger_cannot_answer_for_a_node(self, clock):
        class Meddling(FakeGrid):
            def pull_messages(self, message_ids):
                replies = super().pull_messages(message_ids)
                for reply in replies:
                    reply.metadata.__dict__["_reply_to_message_id"] = "of another question"
                return replies

        assert directory_at(clock, timeout_s=1.0).refresh(Meddling(n11=placed(0, 1))) == []
