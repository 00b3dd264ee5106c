"""Bounds of a client's weight in averages: the operator's, and that of the median node."""

import logging
from dataclasses import replace

import pytest

from hafl_app.server.settings import FederationSettings
from hafl_app.server.weights import ExampleBound
from hafl_app.wire.node_profile import NodeProfile


def nodes(*stated):
    return [NodeProfile(i, 99, 2, n, "cpu", node_id=100 + i) for i, n in enumerate(stated)]


def bound(*stated, **changes):
    return ExampleBound.of(replace(FederationSettings(), **changes), nodes(*stated))


ATTACKER = nodes(10**12)[0]


def test_a_claim_of_a_trillion_examples_counts_as_ten_median_nodes(caplog):
    honest = (30, 40, 50, 60)

    with caplog.at_level(logging.WARNING):
        counted = bound(*honest, 10**12).count(10**12, ATTACKER)

    assert counted == 10 * 50
    assert "500 of the 1000000000000 examples that it states count" in caplog.text
    assert "federation.max_examples_ratio=10" in caplog.text


def test_honest_nodes_count_as_they_state(caplog):
    of_round = bound(30, 40, 50, 60, 450)

    with caplog.at_level(logging.WARNING):
        assert [of_round.count(n, ATTACKER) for n in (30, 60, 450)] == [30, 60, 450]
    assert not caplog.text


def test_of_three_nodes_the_median_is_honest():
    assert bound(30, 50, 10**12).count(10**12, ATTACKER) == 10 * 50


def test_two_nodes_have_no_median_to_go_by():
    assert bound(1, 1000).count(1000, ATTACKER) == 1000


def test_the_operators_bound_holds_however_few_there_are(caplog):
    with caplog.at_level(logging.WARNING):
        assert bound(7, 900, max_examples_per_node=100).count(900, ATTACKER) == 100
    assert "federation.max_examples_per_node=100" in caplog.text


@pytest.mark.parametrize(("most", "expected"), [(60, 60), (5000, 500)])
def test_the_lower_bound_counts(most, expected):
    assert (
        bound(30, 40, 50, 60, 10**6, max_examples_per_node=most).count(10**6, ATTACKER) == expected
    )


def test_uniform_weights_count_one():
    assert bound(3, 900, weighting="uniform").count(900, ATTACKER) == 1


def test_no_bound_at_all():
    free = bound(1, 1, 1, 1, 1, max_examples_ratio=None)
    assert free.count(10**12, ATTACKER) == 10**12
