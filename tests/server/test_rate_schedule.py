"""Learning rates from round to round: the schedules, and the rates in the plans."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from driving import STRATEGIES, Client, run_options, strategy_named
from flwr.app import MessageType
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from hafl_app.engines.in_process import server_identity
from hafl_app.server.rate_schedule import round_rates
from hafl_app.training.settings import ScheduleSettings
from hafl_app.wire.requests import read_request

COSINE = ScheduleSettings("cosine", warmup_rounds=1, final=0.1)
KINDS = st.sampled_from(["constant", "linear", "cosine"])


def of_torch(make, rounds):
    """Return the rates of one of torch's schedulers, from a rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(rounds):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


class TestRates:
    def test_cosine_falls_as_torchs_does(self):
        expected = of_torch(lambda o: lr_scheduler.CosineAnnealingLR(o, 7, eta_min=0.2), 7)
        assert round_rates(ScheduleSettings("cosine", final=0.2), 7) == pytest.approx(expected)

    def test_linear_falls_as_torchs_does(self):
        expected = of_torch(lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, total_iters=7), 7)
        assert round_rates(ScheduleSettings("linear", final=0.2), 7) == pytest.approx(expected)

    def test_constant_stays_whatever_final_is(self):
        assert round_rates(ScheduleSettings("constant", final=0.3), 4) == (1.0,) * 4

    def test_a_warm_up_climbs_in_equal_steps_and_the_fall_begins_at_the_peak(self):
        rates = round_rates(ScheduleSettings("linear", warmup_rounds=3), 8)
        assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2])

    @given(KINDS, st.integers(0, 9), st.integers(1, 30), st.floats(0, 1))
    def test_there_is_one_a_round_and_none_stands_still(self, kind, warmup, more, final):
        rates = round_rates(ScheduleSettings(kind, warmup, final), warmup + more)

        assert len(rates) == warmup + more
        assert all(0 < rate <= 1 for rate in rates)
        assert rates[warmup] == 1
        assert all(a < b for a, b in pairwise(rates[: warmup + 1]))
        assert all(a >= b >= final for a, b in pairwise(rates[warmup:]))


class TestOptions:
    def test_without_a_schedule_every_round_has_the_rate_of_the_settings(self):
        options = run_options(num_rounds=3)
        assert options.rate(2) == options.rate(99) == 1.0
        assert options.rates_until(3) == (1.0,)

    def test_the_rounds_that_the_privacy_budget_allows_are_all_there_are(self):
        options = run_options(num_rounds=30, schedule=ScheduleSettings("linear"))
        options.__dict__["last_round"] = 5  # cached; what it is by epsilon takes a second
        assert options.rates_until(5) == pytest.approx((1.0, 0.8, 0.6, 0.4, 0.2))

    def test_who_trains_for_several_rounds_at_once_has_the_rates_of_all(self):
        options = run_options(num_rounds=4, schedule=ScheduleSettings("linear"))
        assert options.rates_until(3) == (1.0, 0.75, 0.5)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_plans_of_every_method_have_the_rate_of_their_round(name):
    strategy = strategy_named(name)
    strategy.options = run_options(strategy.options, num_rounds=4, schedule=COSINE)
    profile = replace(Client(3, 10, 0).profile, node_id=7)

    def sent(server_round, phase):
        [message] = strategy.coordinator._ask([profile], server_round, phase)
        return read_request(message).plan.rates

    with server_identity():
        rates = [sent(number, MessageType.TRAIN) for number in (1, 2, 4)]
        assert rates == [(rate,) for rate in map(strategy.options.rate, (1, 2, 4))]
        assert rates[0] == (0.5,)
        assert sent(1, MessageType.EVALUATE) == (1.0,)
