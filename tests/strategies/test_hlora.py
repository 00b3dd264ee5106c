"""HLoRA: FlexLoRA's model, split the other way."""

import numpy as np
from driving import (
    MAX_RANK,
    Client,
    advance,
    at_start,
    dense,
    merge,
    noise,
    nothing,
    strategy_named,
    update_of,
)
from numpy.testing import assert_allclose

CLIENTS = [Client(r, n, i) for i, (r, n) in enumerate([(1, 10), (2, 25), (4, 7), (3, 31)])]


def test_lora_b_has_unit_columns_and_lora_a_the_singular_values():
    strategy = strategy_named("hlora")
    updates = [update_of(strategy, client, noise) for client in CLIENTS]

    after = merge(strategy, updates)

    for name, factors in after.items():
        mean = sum(u.num_examples / 73 * dense(u.adapter.modules[name]) for u in updates)
        u, s, vt = np.linalg.svd(mean)
        best = u[:, :MAX_RANK] * s[:MAX_RANK] @ vt[:MAX_RANK]
        assert_allclose(dense(factors), best, atol=1e-5)
        assert_allclose(factors.lora_B.T @ factors.lora_B, np.eye(MAX_RANK), atol=1e-5)
        assert_allclose(factors.lora_A.norm(dim=1), s[:MAX_RANK], rtol=1e-4)


def test_the_model_is_flexloras():
    one, other = (
        merge(s, [update_of(s, client, noise) for client in CLIENTS])
        for s in (strategy_named("hlora"), strategy_named("flexlora"))
    )
    for name, factors in one.items():
        assert_allclose(dense(factors), dense(other[name]), atol=1e-5)


def test_a_component_without_content_has_an_orthonormal_column():
    strategy = at_start(strategy_named("hlora"))
    advance(strategy, [update_of(strategy, c, nothing) for c in CLIENTS])

    for factors in strategy.global_adapter.modules.values():
        assert not factors.lora_A.any()
        assert_allclose(factors.lora_B.T @ factors.lora_B, np.eye(MAX_RANK), atol=1e-5)
