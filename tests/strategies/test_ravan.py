"""RAVAN: a client trains some heads, and a head is averaged over those who trained it."""

import numpy as np
import pytest
from driving import Client, dense, merge, noise, strategy_named, update_of
from numpy.testing import assert_allclose

from hafl_app.server.method import StrategyError
from hafl_app.strategies.ravan import Ravan

TWO = "strategy.num_heads=2"
CLIENTS = [Client(rank, n, i) for i, (rank, n) in enumerate([(2, 10), (3, 25), (4, 7)])]


def heads_of(plan, name="query"):
    return sorted({i // 2 for i in plan.modules[name].trainable})


def test_ranks_become_whole_heads_and_all_heads_are_held():
    strategy = strategy_named("ravan", TWO)
    for client, trained in zip(CLIENTS, (1, 1, 2), strict=True):
        plan = strategy.plan(client.profile, 1)
        for name, module in plan.modules.items():
            assert module.held == (0, 1, 2, 3)
            assert len(heads_of(plan, name)) == trained
            assert len(module.trainable) == 2 * trained
            assert module.core.scaled


def test_every_head_is_drawn_in_some_round():
    strategy = strategy_named("ravan")
    profile = Client(1, 10, 0).profile
    drawn = [strategy.plan(profile, r).modules["query"].trainable for r in range(1, 30)]
    assert {i for one in drawn for i in one} == {0, 1, 2, 3}


def test_bytes_are_those_of_the_heads():
    strategy, head = strategy_named("ravan", TWO), 4 * (3 * 7 + 3)
    down, up = strategy.payload_bytes(CLIENTS[0].profile)
    assert down == 4 * 2 * (2 * 2 * 2) + head  # both heads of two modules
    assert up == 4 * 2 * (2 * 2) + head  # one


def test_a_head_is_averaged_over_those_who_trained_it():
    """The equation in numpy, with the heads as the plans say: sum_h B_h H_h A_h."""
    strategy = strategy_named("ravan", TWO)
    updates = [update_of(strategy, client, noise) for client in CLIENTS]
    counts = {h: sum(h in heads_of(u.plan) for u in updates) for h in (0, 1)}
    assert sorted(counts.values()) != [3, 3]  # else nothing is special about contributors

    after = merge(strategy, updates)

    for name, factors in after.items():
        bases = strategy.bases()[name]
        total = np.zeros((factors.out_features, factors.in_features))
        for h in (0, 1):
            B = bases.lora_B[:, 2 * h : 2 * h + 2].double().numpy()
            A = bases.lora_A[2 * h : 2 * h + 2].double().numpy()
            H, weight = np.zeros((2, 2)), 0
            for update in updates:
                trained = list(update.plan.modules[name].trainable)
                if 2 * h in trained:
                    at = trained.index(2 * h)
                    core = update.adapter.modules[name].lora_B[:, at : at + 2].double().numpy()
                    H, weight = H + update.num_examples * core, weight + update.num_examples
            if weight == 0:
                before = strategy.global_adapter.modules[name].select((2 * h, 2 * h + 1))
                total += dense(before)
            else:
                total += B @ (H / weight) @ A
        assert_allclose(dense(factors), total, atol=1e-5)


def test_what_makes_no_whole_head_is_refused():
    with pytest.raises(StrategyError, match="rank 1, below the 2 of a head"):
        strategy_named("ravan", TWO).check([1, 4])
    with pytest.raises(StrategyError, match="max_rank=4 is no multiple"):
        Ravan(max_rank=4, num_heads=3).check([4])
    strategy_named("ravan", TWO).check([2, 3, 4])
