"""FedMomentum: the largest components go on, balanced; the residual joins the base."""

import numpy as np
import pytest
from driving import (
    MAX_RANK,
    Client,
    advance,
    at_start,
    dense,
    noise,
    nothing,
    strategy_named,
    update_of,
)
from numpy.testing import assert_allclose

CLIENTS = [Client(MAX_RANK, n, i) for i, n in enumerate((10, 25, 7))]
SHARES = [10 / 42, 25 / 42, 7 / 42]


def mean_of(updates, name):
    return sum(w * dense(u.adapter.modules[name]) for w, u in zip(SHARES, updates, strict=True))


@pytest.mark.parametrize("tau", [0.9, 0.999, 1.0])
def test_major_residual_and_negligible_components(tau):
    strategy = at_start(strategy_named("fedmomentum", f"strategy.energy={tau}"))
    base = dict.fromkeys(strategy.global_adapter.modules, 0.0)
    for server_round in (1, 2):
        updates = [update_of(strategy, c, noise, server_round) for c in CLIENTS]
        advance(strategy, updates)

        for name, factors in strategy.global_adapter.modules.items():
            u, s, vt = np.linalg.svd(mean_of(updates, name), full_matrices=False)
            energy = np.cumsum(s**2) / (s**2).sum()
            p = max(MAX_RANK, int((energy < tau).sum()) + 1) if tau < 1 else len(s)
            base[name] = base[name] + u[:, MAX_RANK:p] * s[MAX_RANK:p] @ vt[MAX_RANK:p]
            first, rest = (
                factors.select(range(MAX_RANK)),
                factors.select(range(MAX_RANK, factors.rank)),
            )
            best = u[:, :MAX_RANK] * s[:MAX_RANK] @ vt[:MAX_RANK]
            assert_allclose(dense(first), best, atol=1e-5)
            assert_allclose(dense(rest), base[name] + np.zeros_like(best), atol=1e-5)
            assert_allclose(first.lora_B.norm(dim=0) ** 2, s[:MAX_RANK], rtol=1e-4)
            assert_allclose(first.lora_A.norm(dim=1) ** 2, s[:MAX_RANK], rtol=1e-4)


def test_a_component_without_content_keeps_a_row_to_learn_from():
    strategy = at_start(strategy_named("fedmomentum"))
    advance(strategy, [update_of(strategy, c, nothing) for c in CLIENTS])

    for factors in strategy.global_adapter.modules.values():
        assert factors.rank == MAX_RANK
        assert not factors.lora_B.any()
        assert_allclose(factors.lora_A.norm(dim=1), np.ones(MAX_RANK), rtol=1e-5)


def test_split_b_leaves_the_model_as_it_is():
    one, other = (
        at_start(strategy_named("fedmomentum", f"strategy.split={split}"))
        for split in ("both", "B")
    )
    for strategy in (one, other):
        advance(strategy, [update_of(strategy, c, noise) for c in CLIENTS])
    for name, factors in other.global_adapter.modules.items():
        assert_allclose(dense(factors), dense(one.global_adapter.modules[name]), atol=1e-5)
        assert_allclose(factors.lora_A[:MAX_RANK].norm(dim=1), np.ones(MAX_RANK), rtol=1e-5)
