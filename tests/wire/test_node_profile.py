import json
from collections import Counter
from dataclasses import replace

import pytest
from flwr.app import Message, MessageType, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from hafl_app.engines.in_process import server_identity
from hafl_app.seeds import client_seed
from hafl_app.server.client_sampling import sample_profiles
from hafl_app.wire.node_profile import PROFILE, NodeProfile, scale_tiers

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

    def test_a_stated_bandwidth_arrives(self):
        stated = replace(GPU, bandwidth_kbps=250)
        assert NodeProfile.from_reply(reply_of(stated.to_record())).bandwidth_kbps == 250

    def test_a_node_may_leave_out_what_its_device_is(self):
        record = NodeProfile(0, 2, 4, 9, "cpu").to_record()
        for key in ("device-name", "memory-free-mb", "torch-version", "bandwidth-kbps"):
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
            ("bandwidth-kbps", -1),
            ("bandwidth-kbps", 2.5),
            ("bandwidth-kbps", 10**9 + 1),
            ("device", 3),
            ("device", "cpu" * 40),
            ("device-name", "A100\nround 1/10  val 99.9%"),
            ("device-name", "\x1b[2J"),
            ("torch-version", b"2.13"),
            ("cuda-version", ["12"]),
            ("rank-pattern", '{"query": 70000}'),
            ("rank-pattern", json.dumps({f"layer{i}": 2 for i in range(20_000)})),
            ("rank-pattern", json.dumps({f"{i}.*.*.*Q": 2 for i in range(22)})),
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
        assert replace(GPU, precision="bf16").device_line == "NVIDIA L4, bf16, 21.5 GB free"
        cpu = replace(GPU, device="cpu", device_name="Some(R) CPU @ 2.20GHz", memory_free_mb=640)
        assert cpu.device_line == "cpu, 0.6 GB free"
        assert NodeProfile(0, 2, 4, 9, "cpu").device_line == "cpu"
