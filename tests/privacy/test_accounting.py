"""Epsilon against values derived here from the Rényi divergence, and its limits."""

import logging
import math

import pytest

from hafl_app.privacy.accounting import (
    central_epsilon,
    epsilon_after,
    local_epsilon,
    rounds_within,
)
from hafl_app.privacy.mechanism import PrivacyOptions

DELTA = 1e-5


def gaussian_epsilon(noise_multiplier: float, rounds: int, delta: float) -> float:
    """Return epsilon of ``rounds`` Gaussian releases, minimized over a fine grid of orders.

    Order a: the divergence of N(1, z^2) from N(0, z^2) is a / (2 z^2), and adds up over rounds.
    Conversion: Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy",
    arXiv:2004.00010, proposition 12.
    """
    orders = [1 + k / 1000 for k in range(20, 100_000)]
    return min(
        rounds * a / (2 * noise_multiplier**2) + math.log1p(-1 / a) - math.log(delta * a) / (a - 1)
        for a in orders
    )


def exact_gaussian_delta(noise_multiplier: float, rounds: int, epsilon: float) -> float:
    """Return the smallest delta of ``rounds`` Gaussian releases.

    Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", arXiv:1805.06530,
    theorem 8, with sensitivity sqrt(rounds) over z.
    """

    def below(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    mu = math.sqrt(rounds) / noise_multiplier
    return below(mu / 2 - epsilon / mu) - math.exp(epsilon) * below(-mu / 2 - epsilon / mu)


class TestCentral:
    @pytest.mark.parametrize(("multiplier", "rounds"), [(1.0, 1), (1.3, 10), (4.0, 30), (9.0, 200)])
    def test_full_participation_is_the_gaussian_mechanism(self, multiplier, rounds):
        expected = gaussian_epsilon(multiplier, rounds, DELTA)

        # The library searches a coarser grid of orders: never below, and at most 1 % above.
        epsilon = central_epsilon(multiplier, 1.0, rounds, DELTA)
        assert expected <= epsilon <= 1.01 * expected

    @pytest.mark.parametrize(("multiplier", "rounds"), [(1.0, 1), (1.3, 10), (9.0, 200)])
    def test_it_is_an_upper_bound_of_the_exact_loss(self, multiplier, rounds):
        epsilon = central_epsilon(multiplier, 1.0, rounds, DELTA)

        assert exact_gaussian_delta(multiplier, rounds, epsilon) <= DELTA
        # And no idle one: 20 % less would not hold.
        assert exact_gaussian_delta(multiplier, rounds, 0.8 * epsilon) > DELTA

    def test_sampling_amplifies(self):
        # At order 2 the sampled Gaussian's divergence is log(1 + q^2 (exp(1 / z^2) - 1)):
        # Mironov, Talwar and Zhang, arXiv:1908.10530, section 3.3, with alpha = 2.
        rate, multiplier, rounds = 0.2, 2.0, 12
        order_2 = rounds * math.log1p(rate**2 * math.expm1(1 / multiplier**2))
        bound = order_2 + math.log(1 / 2) - math.log(2 * DELTA)

        epsilon = central_epsilon(multiplier, rate, rounds, DELTA)

        assert epsilon <= bound
        assert epsilon < 0.5 * central_epsilon(multiplier, 1.0, rounds, DELTA)

    def test_more_rounds_more_clients_and_less_noise_cost_more(self):
        middle = central_epsilon(1.5, 0.3, 20, DELTA)

        assert central_epsilon(1.5, 0.3, 21, DELTA) > middle
        assert central_epsilon(1.5, 0.4, 20, DELTA) > middle
        assert central_epsilon(1.4, 0.3, 20, DELTA) > middle
        assert central_epsilon(1.5, 0.3, 20, DELTA / 10) > middle

    def test_enough_noise_costs_next_to_nothing(self):
        assert central_epsilon(1e4, 1.0, 10, DELTA) < 0.01

    def test_no_round_costs_nothing(self):
        assert central_epsilon(0.5, 0.3, 0, DELTA) == local_epsilon(0.5, 0, DELTA) == 0

    def test_orders_left_out_are_not_told(self, caplog):
        central_epsilon.cache_clear()
        with caplog.at_level(logging.WARNING):
            central_epsilon(1.0, 0.3, 10, DELTA)

        assert not caplog.records


class TestLocal:
    def test_replacing_all_data_moves_the_change_by_twice_the_bound(self):
        expected = gaussian_epsilon(3.0 / 2, 10, DELTA)

        assert expected <= local_epsilon(3.0, 10, DELTA) <= 1.01 * expected

    def test_sampling_hides_nothing_from_the_server(self):
        options = PrivacyOptions("local_dp", noise_multiplier=3.0)

        assert epsilon_after(options, 10, 0.1) == epsilon_after(options, 10, 1.0)


class TestBudget:
    @pytest.mark.parametrize("kind", ["central_dp", "local_dp"])
    def test_the_last_round_within_the_budget_is_the_last(self, kind):
        options = PrivacyOptions(kind, noise_multiplier=2.0, max_epsilon=9.0)

        rounds = rounds_within(options, 0.5, 1000)

        assert 0 < rounds < 1000
        assert epsilon_after(options, rounds, 0.5) <= 9.0 < epsilon_after(options, rounds + 1, 0.5)

    def test_a_budget_may_be_spent_to_the_last(self):
        options = PrivacyOptions("central_dp", max_epsilon=central_epsilon(1.0, 1.0, 4, DELTA))

        assert rounds_within(options, 1.0, 10) == 4

    def test_a_budget_below_one_round_allows_none(self):
        options = PrivacyOptions("central_dp", noise_multiplier=0.3, max_epsilon=0.1)

        assert rounds_within(options, 1.0, 10) == 0

    def test_without_a_budget_all_rounds_may_happen(self):
        assert rounds_within(PrivacyOptions("central_dp"), 1.0, 10) == 10
        assert rounds_within(PrivacyOptions("none", max_epsilon=1.0), 1.0, 10) == 10

    def test_without_privacy_epsilon_is_infinite(self):
        assert epsilon_after(PrivacyOptions(), 1, 1.0) == math.inf
