"""Work of the server for one node, which must not grow with the nodes that are already there."""

from types import SimpleNamespace

import pytest
from driving import strategy_named

from hafl_app.server.method import StrategyError
from hafl_app.wire.node_profile import NodeProfile


def node(number, rank, **changes):
    return NodeProfile(number, 1000, rank, 5 + number, "cpu", node_id=number + 1, **changes)


@pytest.fixture
def looked_at(monkeypatch):
    """A strategy, and how many ranks its checks have looked at."""
    strategy, lengths = strategy_named("hafl"), []
    check = type(strategy).check
    monkeypatch.setattr(
        type(strategy),
        "check",
        lambda self, ranks: lengths.append(len(ranks)) or check(self, ranks),
    )
    return strategy, lengths


def test_a_thousand_nodes_that_join_late_are_checked_in_a_thousand_steps(looked_at):
    strategy, lengths = looked_at
    accepts = strategy.coordinator.participation.accepts

    assert all(accepts(node(number, 1 + number % 3)) for number in range(1000))

    assert len(lengths) == 1000
    assert max(lengths) <= 3  # the ranks that occur, not the nodes that have them


def test_a_node_that_was_served_before_is_not_checked_again(looked_at):
    strategy, lengths = looked_at
    accepts = strategy.coordinator.participation.accepts
    first = node(0, 2)

    assert [accepts(first) for _ in range(3)] == [True] * 3
    assert accepts(node(0, 2))

    assert len(lengths) == 1


def test_a_node_that_changes_is_measured_against_the_others_alone():
    participation = strategy_named("fedit").coordinator.participation  # one rank for all
    refused = []
    participation.directory = SimpleNamespace(refuse=lambda node_id, _: refused.append(node_id))
    accepts = participation.accepts

    assert accepts(node(0, 2))
    assert accepts(node(0, 3))  # no other node is there
    assert accepts(node(1, 3))
    assert not accepts(node(1, 2))
    assert not accepts(node(2, 2))

    assert refused == [2, 3]


def test_a_rank_that_is_too_large_is_refused_whoever_else_is_there():
    strategy = strategy_named("hafl")
    accepts = strategy.coordinator.participation.accepts

    assert accepts(node(0, 2))
    with pytest.raises(StrategyError, match=r"above lora\.max_rank"):
        strategy.check([99])
    assert not accepts(node(1, 99))
