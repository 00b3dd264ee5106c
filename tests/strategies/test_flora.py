"""FLoRA: the stack is the mean of the products, and every client starts at the mean."""

import numpy as np
import pytest
import torch
from driving import (
    MAX_RANK,
    SHAPES,
    Client,
    advance,
    at_start,
    dense,
    model_after,
    noise,
    strategy_named,
    update_of,
)
from numpy.testing import assert_allclose

CLIENTS = [Client(r, n, i) for i, (r, n) in enumerate([(1, 10), (2, 25), (4, 7), (3, 31)])]
WARM = "strategy.restart=warm"


def stacked(updates, name):
    """Return ``B A`` of the paper: ``[B_1 .. B_K]`` times ``[w_1 A_1; ..; w_K A_K]``."""
    total = sum(u.num_examples for u in updates)
    factors = [u.adapter.modules[name] for u in updates]
    B = np.concatenate([f.lora_B.double().numpy() for f in factors], axis=1)
    weighted = [
        u.num_examples / total * f.lora_A.double().numpy()
        for u, f in zip(updates, factors, strict=True)
    ]
    return B @ np.concatenate(weighted, axis=0)


def test_fresh_the_base_gains_every_rounds_stack_and_the_components_are_new():
    strategy = at_start(strategy_named("flora"))
    expected, drawn = dict.fromkeys(SHAPES, 0.0), []
    for server_round, clients in enumerate((CLIENTS, CLIENTS[1:3], CLIENTS[:2]), start=1):
        updates = [update_of(strategy, c, noise, server_round) for c in clients]
        advance(strategy, updates)

        for name, factors in strategy.global_adapter.modules.items():
            expected[name] = expected[name] + stacked(updates, name)
            first = factors.select(range(MAX_RANK))
            assert not first.lora_B.any()
            assert first.lora_A.any(1).all()
            assert_allclose(dense(factors), expected[name], atol=1e-5)
        drawn.append(strategy.global_adapter.modules["query"].lora_A[:MAX_RANK])
    assert not any(torch.equal(drawn[i], drawn[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("overrides", [(), (WARM,)])
def test_a_client_of_any_rank_starts_at_the_global_model(overrides):
    strategy = at_start(strategy_named("flora", *overrides))
    advance(strategy, [update_of(strategy, c, noise) for c in CLIENTS])

    for client in CLIENTS:
        sent = strategy.dispatch(strategy.plan(client.profile, 2))
        for name, factors in strategy.global_adapter.modules.items():
            assert_allclose(dense(sent.modules[name]), dense(factors), atol=1e-5)


def test_warm_the_mean_of_the_clients_models_is_split_at_its_largest_components():
    strategy = at_start(strategy_named("flora", WARM))
    for server_round in (1, 2, 3):
        updates = [update_of(strategy, c, noise, server_round) for c in CLIENTS]
        advance(strategy, updates)

        for name, factors in strategy.global_adapter.modules.items():
            mean = sum(
                c.num_examples / 73 * dense(model_after(u)[name])
                for c, u in zip(CLIENTS, updates, strict=True)
            )
            assert_allclose(dense(factors), mean, atol=1e-5)
            u, s, vt = np.linalg.svd(mean)
            best = u[:, :MAX_RANK] * s[:MAX_RANK] @ vt[:MAX_RANK]
            assert_allclose(dense(factors.select(range(MAX_RANK))), best, atol=1e-5)


def test_a_failed_round_draws_the_same_components_again():
    strategy = at_start(strategy_named("flora"))
    updates = [update_of(strategy, c, noise) for c in CLIENTS]
    memory, before = strategy.memory(), strategy.global_adapter

    advance(strategy, updates)
    first = strategy.global_adapter
    strategy.recall(memory)
    strategy.global_adapter = before
    advance(strategy, updates)

    for name, factors in strategy.global_adapter.modules.items():
        assert torch.equal(factors.lora_A, first.modules[name].lora_A)
