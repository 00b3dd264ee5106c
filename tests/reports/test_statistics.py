"""Paired differences against numbers worked out by hand."""

import math

import pytest

from hafl_app.reports.statistics import Paired, Spread


@pytest.mark.parametrize("one", [math.nan, math.inf])
def test_a_value_that_is_no_number_leaves_no_deviation(one):
    # Python 3.11 raises an AttributeError at it: what a run could not measure is no number.
    assert math.isnan(Spread((one, one)).sd)
    assert math.isnan(Spread((0.5, one)).sd)
    assert Spread((1.0, 3.0)).sd == pytest.approx(math.sqrt(2))


def test_the_interval_is_students():
    paired = Paired((1.0, 2.0, 3.0))
    # t of 97.5 % at 2 degrees of freedom is 4.3027; the deviation is 1, the root of 3 is 1.7321.
    low, high = paired.interval
    assert paired.mean == 2
    assert (low, high) == (pytest.approx(2 - 2.4841, abs=1e-4), pytest.approx(4.4841, abs=1e-4))


def test_differences_that_are_alike_are_sure():
    assert Paired((0.5, 0.5)).interval == (0.5, 0.5)


@pytest.mark.parametrize("each", [(), (0.5,)])
def test_fewer_than_two_have_no_interval(each):
    assert Paired(each).interval is None


def test_pairs_are_of_the_same_seed():
    # Seeds that one of both lacks, or that have no score, drop out.
    scores = {0: 0.3, 1: 0.8, 2: 0.5, 3: math.nan}
    baseline = {3: 0.1, 1: 0.7, 0: 0.2, 4: 0.9}
    assert Paired.of(scores, baseline).each == pytest.approx((0.1, 0.1))


def test_of_nothing_in_common_is_no_number():
    assert math.isnan(Paired.of({0: 0.3}, {1: 0.3}).mean)
