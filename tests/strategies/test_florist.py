"""FLoRIST: the smallest rank with that share of the stack's energy, module by module."""

import numpy as np
import pytest
from driving import (
    MAX_RANK,
    Client,
    advance,
    at_start,
    dense,
    noise,
    strategy_named,
    update_of,
)
from numpy.testing import assert_allclose

CLIENTS = [Client(r, n, i) for i, (r, n) in enumerate([(1, 10), (2, 25), (4, 7), (3, 31)])]


def cut(matrix, tau):
    u, s, vt = np.linalg.svd(matrix)
    p = next(p for p in range(1, len(s) + 1) if (s[:p] ** 2).sum() >= tau * (s**2).sum())
    return u[:, :p] * s[:p] @ vt[:p], p


@pytest.mark.parametrize("tau", [0.6, 0.9, 0.99])
def test_every_rounds_stack_is_cut_before_it_joins_the_base(tau):
    strategy = at_start(strategy_named("florist", f"strategy.energy={tau}"))
    expected = dict.fromkeys(strategy.global_adapter.modules, 0.0)
    for server_round, clients in enumerate((CLIENTS, CLIENTS[1:3]), start=1):
        updates = [update_of(strategy, c, noise, server_round) for c in clients]
        advance(strategy, updates)

        total = sum(c.num_examples for c in clients)
        for name, factors in strategy.global_adapter.modules.items():
            stack = sum(u.num_examples / total * dense(u.adapter.modules[name]) for u in updates)
            kept, rank = cut(stack, tau)
            expected[name] = expected[name] + kept
            assert not factors.lora_B[:, :MAX_RANK].any()
            assert_allclose(dense(factors), expected[name], atol=1e-5)
            if server_round == 1:
                assert factors.rank == MAX_RANK + rank


def test_with_all_energy_it_is_flora():
    one, other = (
        at_start(strategy_named(*named)) for named in (("florist", "strategy.energy=1"), ("flora",))
    )
    for strategy in (one, other):
        advance(strategy, [update_of(strategy, c, noise) for c in CLIENTS])
    for name, factors in one.global_adapter.modules.items():
        assert_allclose(dense(factors), dense(other.global_adapter.modules[name]), atol=1e-5)
