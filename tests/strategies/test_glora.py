"""GLoRA: a mean of products in the subspace that clients share."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from driving import (
    MAX_RANK,
    Client,
    at_start,
    dense,
    merge,
    noise,
    nothing,
    strategy_named,
    update_of,
)
from numpy.testing import assert_allclose

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.server.method import StrategyError

CLIENTS = [Client(r, n, i) for i, (r, n) in enumerate([(1, 10), (2, 25), (4, 7), (3, 31)])]
SHARES = [10 / 73, 25 / 73, 7 / 73, 31 / 73]


def leading(projector, rank):
    vectors = np.linalg.eigh(projector).eigenvectors[:, ::-1][:, :rank]
    return vectors @ vectors.T


def oracle(products, rank):
    """Return the model from the equations, over dense matrices."""
    rows, columns = 0, 0
    for share, product in zip(SHARES, products, strict=True):
        u, s, vt = np.linalg.svd(product)
        kept = (s > 1e-6 * s[0]).sum()
        columns = columns + share * u[:, :kept] @ u[:, :kept].T
        rows = rows + share * vt[:kept].T @ vt[:kept]
    mean = sum(w * p for w, p in zip(SHARES, products, strict=True))
    u, s, vt = np.linalg.svd(leading(columns, rank) @ mean @ leading(rows, rank))
    return u[:, :MAX_RANK] * s[:MAX_RANK] @ vt[:MAX_RANK]


@pytest.mark.parametrize("subspace_rank", [0, 5])
def test_the_mean_is_taken_in_the_leading_subspaces_of_the_mean_projectors(subspace_rank):
    strategy = strategy_named("glora", f"strategy.subspace_rank={subspace_rank}")
    flexlora = strategy_named("flexlora")
    updates = [update_of(strategy, c, noise) for c in CLIENTS]

    after, largest = merge(strategy, updates), merge(flexlora, updates)

    differs = False
    for name, factors in after.items():
        products = [dense(u.adapter.modules[name]) for u in updates]
        expected = oracle(products, subspace_rank or MAX_RANK)
        assert_allclose(dense(factors), expected, atol=1e-5)
        differs |= np.abs(dense(factors) - dense(largest[name])).max() > 1e-2
    assert differs


def test_a_subspace_of_all_uploads_is_flexlora():
    strategy = strategy_named("glora", "strategy.subspace_rank=10")
    updates = [update_of(strategy, c, noise) for c in CLIENTS]

    after, expected = merge(strategy, updates), merge(strategy_named("flexlora"), updates)

    for name, factors in after.items():
        assert_allclose(dense(factors), dense(expected[name]), atol=1e-5)
        assert_allclose(dense(factors.select([0])), dense(expected[name].select([0])), atol=1e-5)


def test_how_a_product_is_factored_does_not_matter():
    strategy = strategy_named("glora")
    updates = [update_of(strategy, c, noise) for c in CLIENTS]

    def refactored(update):
        generator = torch.Generator().manual_seed(update.partition_id)
        modules = {}
        for name, f in update.adapter.modules.items():
            G = torch.eye(f.rank) + 0.5 * torch.rand(f.rank, f.rank, generator=generator)
            modules[name] = LoraFactors(torch.linalg.inv(G) @ f.lora_A, f.lora_B @ G)
        return replace(update, adapter=Adapter(modules, update.adapter.head))

    one, other = merge(strategy, updates), merge(strategy, [refactored(u) for u in updates])
    for name, factors in one.items():
        assert_allclose(dense(other[name]), dense(factors), atol=1e-4)


def test_a_direction_of_one_client_does_not_displace_one_that_many_have():
    strategy, flexlora = (strategy_named(n, "lora.max_rank=1") for n in ("glora", "flexlora"))
    clients = [Client(1, 10, i, noise_seed=5) for i in range(3)]
    updates = [update_of(strategy, c, noise) for c in clients]

    def elsewhere(update):
        modules = {
            n: LoraFactors(f.lora_A.flip(1), 30 * f.lora_B.flip(0))
            for n, f in update.adapter.modules.items()
        }
        return replace(update, adapter=Adapter(modules, update.adapter.head))

    updates[0] = elsewhere(updates[0])

    def agreement(strategy):
        return [
            abs(float(torch.nn.functional.cosine_similarity(a.lora_A, b.lora_A)))
            for a, b in zip(
                (f.select([0]) for f in merge(strategy, updates).values()),
                (f.select([0]) for f in updates[1].adapter.modules.values()),
                strict=True,
            )
        ]

    assert min(agreement(strategy)) > max(agreement(flexlora))


def test_updates_without_content_leave_components_that_can_learn():
    strategy = at_start(strategy_named("glora"))

    after = merge(strategy, [update_of(strategy, c, nothing) for c in CLIENTS])

    for factors in after.values():
        assert factors.rank == MAX_RANK
        assert not factors.lora_B.any()
        assert_allclose(factors.lora_A @ factors.lora_A.T, np.eye(MAX_RANK), atol=1e-6)


def test_a_subspace_below_the_adapter_is_refused():
    with pytest.raises(StrategyError, match=r"subspace_rank=3 is below lora\.max_rank=4"):
        strategy_named("glora", "strategy.subspace_rank=3").check([1, 4])
