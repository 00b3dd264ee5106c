"""Fed-SB: cores alone travel, and their mean is the exact mean of products."""

import numpy as np
import pytest
import torch
from driving import (
    Client,
    at_start,
    dense,
    merge,
    noise,
    run_options,
    strategy_named,
    update_of,
)
from numpy.testing import assert_allclose

from hafl_app.privacy.mechanism import trained_part
from hafl_app.server.compatibility import private_division
from hafl_app.server.method import StrategyError

CLIENTS = [Client(3, n, i) for i, n in enumerate((10, 25, 7))]
SHARES = np.array([10, 25, 7]) / 42


def test_cores_alone_travel_both_ways():
    strategy = strategy_named("fed_sb")
    head = 4 * (3 * 7 + 3)
    assert strategy.payload_bytes(CLIENTS[0].profile) == (4 * 2 * 3 * 3 + head,) * 2
    for factors in strategy.dispatch(strategy.plan(CLIENTS[0].profile, 1)).modules.values():
        assert factors.lora_A.numel() == 0
        assert factors.lora_B.shape == (3, 3)


def test_the_next_adapter_is_the_product_with_the_mean_of_the_cores():
    """The equation in numpy: Delta W = B (sum_k w_k R_k) A, with the first columns of the bases."""
    strategy = strategy_named("fed_sb")
    updates = [update_of(strategy, client, noise) for client in CLIENTS]

    after = merge(strategy, updates)

    for name, factors in after.items():
        R = sum(
            w * u.adapter.modules[name].lora_B.double().numpy()
            for w, u in zip(SHARES, updates, strict=True)
        )
        bases = strategy.bases()[name]
        B, A = bases.lora_B[:, :3].double().numpy(), bases.lora_A[:3].double().numpy()
        assert_allclose(dense(factors.select(range(3))), B @ R @ A, atol=1e-5)
        products = [B @ u.adapter.modules[name].lora_B.double().numpy() @ A for u in updates]
        exact = sum(w * p for w, p in zip(SHARES, products, strict=True))
        assert_allclose(dense(factors.select(range(3))), exact, atol=1e-5)


def test_it_starts_without_effect_and_every_core_at_zero():
    strategy = at_start(strategy_named("fed_sb"))
    sent = strategy.dispatch(strategy.plan(CLIENTS[0].profile, 1))
    assert all(not factors.lora_B.any() for factors in sent.modules.values())


def test_bases_follow_from_the_seed_of_the_run():
    one, other = strategy_named("fed_sb"), strategy_named("fed_sb")
    other.options = run_options(other.options, seed=4)
    assert not torch.equal(one.bases()["query"].lora_B, other.bases()["query"].lora_B)
    assert one.plan(CLIENTS[0].profile, 1).modules["query"].core.seed == 3


def test_only_the_cores_get_the_noise_of_local_privacy():
    strategy = strategy_named("fed_sb")
    plan = strategy.plan(CLIENTS[0].profile, 1)
    part = trained_part(strategy.dispatch(plan), plan)
    assert {t.numel() for n, t in part.tensors().items() if n.startswith("lora_B")} == {9}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"robust": "median"}, "robust=median is refused for strategy=fed_sb"),
        ({"scaffold": True}, "scaffold=true is refused for strategy=fed_sb"),
    ],
)
def test_what_needs_whole_factors_is_refused(change, match):
    strategy = strategy_named("fed_sb")
    strategy.options = run_options(strategy.options, **change)
    with pytest.raises(StrategyError, match=match):
        strategy.check([3])


def test_central_privacy_and_mixed_ranks_are_refused():
    strategy = strategy_named("fed_sb")
    with pytest.raises(StrategyError, match="adds noise to every number of lora_B"):
        private_division(strategy)
    with pytest.raises(StrategyError, match="one rank for all"):
        strategy.check([2, 3])
