"""Client sampling: fixed numbers from the public seed, or independent draws from a secret key."""

from dataclasses import replace

import pytest

from hafl_app.server.client_sampling import sample_poisson, sample_profiles, sample_size
from hafl_app.wire.node_profile import NodeProfile

PROFILES = [NodeProfile(i, 40, 2 + i % 3, 10 + 7 * i, "cpu", node_id=1000 - i) for i in range(40)]


def partitions(profiles: list[NodeProfile]) -> list[int]:
    return [profile.partition_id for profile in profiles]


class TestPoisson:
    def test_each_client_is_drawn_with_the_stated_chance(self):
        rounds = 2000
        drawn = [set(partitions(sample_poisson(PROFILES, 0.3, "key", r))) for r in range(rounds)]

        for partition_id in range(40):
            share = sum(partition_id in d for d in drawn) / rounds
            assert share == pytest.approx(0.3, abs=0.045)  # 4.4 standard errors

    def test_the_number_drawn_varies_as_independent_draws_do(self):
        counts = [len(sample_poisson(PROFILES, 0.3, "key", r)) for r in range(2000)]

        mean = sum(counts) / len(counts)
        variance = sum((c - mean) ** 2 for c in counts) / len(counts)
        assert mean == pytest.approx(12, abs=0.3)
        assert variance == pytest.approx(40 * 0.3 * 0.7, rel=0.15)  # 4.7 standard errors

    def test_all_at_1_and_none_at_0(self):
        assert partitions(sample_poisson(PROFILES, 1.0, "key", 3)) == list(range(40))
        assert sample_poisson(PROFILES, 0.0, "key", 3) == []

    def test_the_draw_may_be_empty(self):
        counts = [len(sample_poisson(PROFILES[:2], 0.3, "key", r)) for r in range(100)]

        assert 0 in counts
        assert min(len(sample_profiles(PROFILES[:2], 0.3, 1, r, "train")) for r in range(9)) == 1

    def test_the_key_and_the_round_decide_and_node_ids_do_not(self):
        renamed = [replace(p, node_id=7 * p.node_id) for p in reversed(PROFILES)]
        first = partitions(sample_poisson(PROFILES, 0.5, "key", 3))

        assert partitions(sample_poisson(renamed, 0.5, "key", 3)) == first == sorted(first)
        assert partitions(sample_poisson(PROFILES, 0.5, "key", 4)) != first
        assert partitions(sample_poisson(PROFILES, 0.5, "other", 3)) != first


class TestSampleSize:
    @pytest.mark.parametrize(
        ("fraction", "count", "expected"),
        [(0.3, 40, 12), (0.01, 40, 1), (1.0, 7, 7), (0.0, 40, 0), (0.5, 0, 0)],
    )
    def test_is_the_share_of_the_clients_and_at_least_one(self, fraction, count, expected):
        assert sample_size(fraction, count) == expected
        assert len(sample_profiles(PROFILES[:count], fraction, 1, 2, "train")) == expected
