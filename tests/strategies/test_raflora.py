"""raFLoRA: every block of ranks is divided by those who reach it."""

import numpy as np
import pytest
from driving import (
    MAX_RANK,
    Client,
    advance,
    dense,
    merge,
    noise,
    nothing,
    set_modules,
    strategy_named,
    update_of,
)
from numpy.testing import assert_allclose

from hafl_app.lowrank.svd import singular_values, truncated_svd

CLIENTS = [Client(r, n, i) for i, (r, n) in enumerate([(1, 10), (3, 25), (4, 7), (3, 31)])]


def in_svd_form(strategy):
    modules = strategy.global_adapter.modules
    set_modules(strategy, {n: truncated_svd(f, MAX_RANK) for n, f in modules.items()})
    return strategy


def by_blocks(updates, name, previous, boundaries):
    """Return the paper's sum over blocks, and an uncovered block as it was."""
    total = np.zeros((previous.out_features, previous.in_features))
    for low, high in zip([0, *boundaries], boundaries, strict=False):
        reach = [u for u in updates if u.adapter.modules[name].rank >= high]
        weight = sum(u.num_examples for u in reach)
        for update in reach:
            block = update.adapter.modules[name].select(range(low, high))
            total += update.num_examples / weight * dense(block)
        if not reach:
            total += dense(previous.select(range(low, high)))
    return total


@pytest.mark.parametrize("clients", [CLIENTS, CLIENTS[:2], CLIENTS[:1]])
def test_is_the_best_approximation_of_the_sum_over_blocks(clients):
    strategy = in_svd_form(strategy_named("raflora"))
    updates = [update_of(strategy, client, noise) for client in clients]

    after = merge(strategy, updates)

    for name, previous in strategy.global_adapter.modules.items():
        # Of all ranks that there are, whoever takes part.
        u, s, vt = np.linalg.svd(by_blocks(updates, name, previous, [1, 3, 4]))
        best = u[:, :MAX_RANK] * s[:MAX_RANK] @ vt[:MAX_RANK]
        assert_allclose(dense(after[name]), best, atol=1e-5)


def test_nothing_collapses_where_clients_change_nothing():
    strategy = in_svd_form(strategy_named("raflora"))
    before = singular_values(strategy.global_adapter.modules["dense"])
    for server_round in (1, 2, 3):
        advance(strategy, [update_of(strategy, c, nothing, server_round) for c in CLIENTS])

    after = singular_values(strategy.global_adapter.modules["dense"])
    assert_allclose(after, before, rtol=1e-5)
