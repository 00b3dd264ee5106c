"""The simulated clock, against seconds worked out by hand."""

import math
import statistics

import pytest

from hafl_app.plan import TrainPlan
from hafl_app.server.devices import DeviceClass, DevicesSettings
from hafl_app.server.round_messages import Reply, Request
from hafl_app.server.simulated_clock import Fleet, SimulatedClock
from hafl_app.wire.node_profile import NodeProfile
from hafl_app.wire.records import FLOPS

# 1 MFLOP/s; 8 Mbit/s down are 1 MB/s, 2 Mbit/s up a quarter of it.
SLOW = DeviceClass(
    peak_flops=4e6, reached=0.25, memory_mb=1, down_mbps=8, up_mbps=2, overhead_s=0.5, up_to_rank=2
)
FAST = DeviceClass(peak_flops=4e9, reached=1.0, memory_mb=1, down_mbps=800, up_mbps=800)
SILENCE = 77.0


def clock(seed=0, **settings):
    devices = DevicesSettings({"fast": FAST, "slow": SLOW}, **settings)
    fleet = Fleet(devices, lambda profile: devices.class_of_rank(profile.rank))
    return SimulatedClock(fleet, seed, SILENCE)


def reply(
    rank=2, partition_id=0, flops=3e6, down=2_000_000, up=1_000_000, error="", server_round=1
):
    profile = NodeProfile(partition_id, 9, rank, 10, "cpu")
    request = Request(profile, TrainPlan({}), server_round, None, down, 0)
    return Reply(request, up, metrics={} if error else {FLOPS: flops}, error=error)


def silent(rank=2):
    return Reply(reply(rank).request, error="no reply in time")


def seconds_of(its, *replies):
    its.begin()
    timed = its.timed(replies)
    its.wait_for(timed)
    return [one.simulated_seconds for one in timed]


class TestAClient:
    def test_takes_its_bytes_its_flops_and_its_overhead(self):
        # overhead 0.5, down 2 MB at 1 MB/s, 3 MFLOP at 1 MFLOP/s, up 1 MB at 0.25 MB/s
        assert seconds_of(clock(), reply()) == [pytest.approx(0.5 + 2 + 3 + 4)]

    def test_has_the_weakest_device_that_affords_its_rank(self):
        slow, fast = seconds_of(clock(), reply(rank=2), reply(rank=3))
        assert slow == pytest.approx(9.5)
        assert fast == pytest.approx(2e6 / 1e8 + 3e6 / 4e9 + 1e6 / 1e8)

    def test_that_answers_with_an_error_takes_its_bytes(self):
        assert seconds_of(clock(), reply(error="broken")) == [pytest.approx(0.5 + 2 + 4)]


class TestARound:
    def test_waits_for_the_slowest(self):
        its = clock()
        seconds_of(its, reply(rank=3), reply(rank=2))
        assert its.take_round() == pytest.approx(9.5)
        assert its.take_round() == 0  # the next one begins at nothing

    def test_adds_up_its_exchanges(self):
        its = clock()
        seconds_of(its, reply())
        seconds_of(its, reply(flops=1e6))  # repeated, or the evaluation
        assert its.take_round() == pytest.approx(9.5 + 7.5)

    def test_replies_one_by_one_are_waited_for_as_all_at_once(self):
        its = clock()
        its.begin()
        for flops in (1e6, 3e6, 2e6):
            its.wait_for(its.timed([reply(flops=flops)]))
        assert its.take_round() == pytest.approx(9.5)

    def test_waits_in_vain_for_a_client_that_is_silent(self):
        its = clock()
        its.begin()
        its.wait_for([silent()])
        assert its.take_round() == SILENCE


class TestADeadline:
    def test_rejects_a_late_client_and_ends_the_wait(self):
        its = clock(deadline_s=8)
        its.begin()
        late, in_time = its.timed([reply(rank=2), reply(rank=3)])
        its.wait_for([late, in_time])

        assert late.error == "missed devices.deadline_s=8 by 1.5 s of the clock"
        assert late.update is None
        assert late.simulated_seconds == pytest.approx(9.5)
        assert not in_time.error
        assert its.take_round() == 8

    def test_is_kept_by_a_client_that_is_just_in_time(self):
        (one,) = clock(deadline_s=9.5001).timed([reply()])
        assert not one.error

    def test_ends_the_wait_for_a_silent_client(self):
        its = clock(deadline_s=8)
        its.begin()
        its.wait_for([silent()])
        assert its.take_round() == 8

    def test_leaves_another_error_as_it_is(self):
        (one,) = clock(deadline_s=1).timed([reply(error="broken")])
        assert one.error == "broken"


class TestJitter:
    def drawn(self, seed=0, rounds=1):
        its = clock(seed, jitter=0.5)
        return [
            seconds_of(its, *(reply(partition_id=k, server_round=r) for k in range(4)))
            for r in range(1, 1 + rounds)
            if its.take_round() is not None
        ]

    def test_is_drawn_by_the_seed(self):
        assert self.drawn(rounds=2) == self.drawn(rounds=2)
        assert self.drawn(seed=1) != self.drawn(seed=2)

    def test_differs_between_clients_and_rounds(self):
        first, second = self.drawn(rounds=2)
        assert len({*first, *second}) == 8

    def test_a_repeated_round_draws_anew(self):
        its = clock(jitter=0.5)
        assert seconds_of(its, reply()) != seconds_of(its, reply())

    def test_has_mean_one_and_the_spread_that_was_asked_for(self):
        its = clock(jitter=0.3)
        factors = [
            one / 9.5 for one in seconds_of(its, *(reply(partition_id=k) for k in range(4000)))
        ]
        assert statistics.fmean(factors) == pytest.approx(1, abs=0.02)
        assert statistics.stdev(map(math.log, factors)) == pytest.approx(0.3, rel=0.05)


class TestClasses:
    @pytest.mark.parametrize(("rank", "name"), [(1, "slow"), (2, "slow"), (3, "fast")])
    def test_null_affords_any_rank(self, rank, name):
        assert DevicesSettings({"fast": FAST, "slow": SLOW}).class_of_rank(rank) == name

    def test_there_may_be_none_for_a_rank(self):
        assert DevicesSettings({"slow": SLOW}).class_of_rank(3) is None
