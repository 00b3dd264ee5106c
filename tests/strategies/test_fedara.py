"""Rank allocation in the style of FedARA: the shrinking budget, and what is pruned for good."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from driving import MAX_RANK, Client, merge, noise, run_options, strategy_named, update_of

from hafl_app.server import aggregation
from hafl_app.server.server_optimizer import ServerOptimizer
from hafl_app.server.settings import ServerOptimizerSettings

CLIENTS = [Client(rank, n, i) for i, (rank, n) in enumerate([(1, 10), (4, 25), (2, 7)])]
SCORES = {"query": [0.9, 0.1, 0.8, 0.2], "dense": [0.3, 0.05, 0.4, 0.01]}


def fedara(rounds=6, **settings):
    strategy = strategy_named("fedara", *(f"strategy.{k}={v}" for k, v in settings.items()))
    strategy.options = run_options(strategy.options, num_rounds=rounds)
    return strategy


def played(strategy, server_round):
    """Play a round in which every client measures the same scores."""
    updates = []
    for client in CLIENTS:
        update = update_of(strategy, client, noise, server_round)
        scores = {n: torch.tensor(SCORES[n])[list(update.components(n))] for n in SCORES}
        updates.append(replace(update, importance=scores))
    merged = merge(strategy, updates)
    strategy.global_adapter = replace(strategy.global_adapter, modules=merged)
    return updates


def test_the_budget_follows_the_cubic_schedule():
    strategy = fedara(rounds=8, warmup_rounds=2, final_rounds=2, target_rank=1)
    # Two modules of four: 8 down to 2 over rounds 2 to 6.
    expected = [round(2 + 6 * (1 - min(max(t - 2, 0) / 4, 1)) ** 3) for t in range(1, 9)]
    assert [strategy.budget(t) for t in range(1, 9)] == expected
    assert expected == [8, 8, 5, 3, 2, 2, 2, 2]


def test_the_least_important_of_the_whole_model_go_and_stay_away():
    strategy = fedara(rounds=6, warmup_rounds=1, target_rank=1)
    ranked = sorted(((s, n, i) for n in SCORES for i, s in enumerate(SCORES[n])), reverse=True)
    for server_round in range(1, 6):
        played(strategy, server_round)
        best = ranked[: strategy.budget(server_round + 1)]
        expected = {n: sorted(i for _, name, i in best if name == n) for n in SCORES}
        assert strategy.left() == expected
        plan = strategy.plan(CLIENTS[1].profile, server_round + 1)
        assert {n: list(m.held) for n, m in plan.modules.items()} == expected
        for name, factors in strategy.global_adapter.modules.items():
            gone = [i for i in range(MAX_RANK) if i not in expected[name]]
            assert not factors.lora_B[:, gone].any()
            assert factors.lora_B[:, expected[name]].any(0).all()
    assert strategy.left() == {"query": [0, 2], "dense": []}  # a module that is pruned


def test_a_client_trains_the_best_within_the_sum_of_its_budgets():
    strategy = fedara(rounds=6, warmup_rounds=3)
    played(strategy, 1)
    plan = strategy.plan(Client(2, 10, 5).profile, 2)
    assert plan.modules["query"].trainable == (0, 2)
    assert plan.modules["dense"].trainable == (0, 2)
    assert {len(m.held) for m in plan.modules.values()} == {MAX_RANK}


def test_a_component_is_the_mean_over_those_who_trained_it():
    strategy = fedara()
    before = strategy.global_adapter
    updates = played(strategy, 1)
    for name, after in strategy.global_adapter.modules.items():
        for i in range(MAX_RANK):
            holders = [u for u in updates if i in u.components(name)]
            columns = [
                u.adapter.modules[name].lora_B[:, u.components(name).index(i)].double().numpy()
                for u in holders
            ]
            weights = [u.num_examples for u in holders]
            expected = np.average(columns, axis=0, weights=weights)
            np.testing.assert_allclose(after.lora_B[:, i], expected, rtol=1e-5)
    assert before is not strategy.global_adapter


def test_a_module_that_no_client_has_measured_gets_a_turn():
    strategy = fedara(warmup_rounds=3)
    alone = Client(1, 10, 0)  # two of eight components a round, which one module may have
    strategy.scores.values = {"query": torch.tensor(SCORES["query"], dtype=torch.float64)}
    plan = strategy.plan(alone.profile, 2)
    assert len(plan.modules["dense"].trainable) >= 1


@pytest.mark.parametrize(("rounds", "left"), [(3, 8), (4, 2)])
def test_nothing_is_pruned_behind_the_last_round(rounds, left):
    strategy = fedara(rounds=rounds, warmup_rounds=3, target_rank=1)
    for server_round in range(1, rounds + 1):
        played(strategy, server_round)
    assert sum(map(len, strategy.left().values())) == left


@pytest.mark.parametrize("kind", ["momentum", "adam", "yogi"])
def test_a_server_optimizer_does_not_bring_back_what_was_pruned(kind):
    strategy = fedara(rounds=4, warmup_rounds=1, target_rank=1)
    strategy.options = run_options(
        strategy.options, server_optimizer=ServerOptimizerSettings(kind=kind)
    )
    optimizer, counts = ServerOptimizer(), []
    for server_round in (1, 2, 3):
        updates = [update_of(strategy, client, noise, server_round) for client in CLIENTS]
        strategy.global_adapter = aggregation.merge(
            strategy, strategy.global_adapter, updates, optimizer=optimizer
        )
        for name, left in strategy.left().items():
            acting = strategy.global_adapter.modules[name].lora_B.any(0).nonzero().flatten()
            assert acting.tolist() == left
        counts.append(sum(map(len, strategy.left().values())))
    assert counts[-1] < counts[0] < 2 * MAX_RANK


@pytest.mark.parametrize("upto", [1, 4])
def test_what_was_pruned_is_remembered(upto):
    strategy, other = (fedara(rounds=6, warmup_rounds=1, target_rank=1) for _ in range(2))
    for server_round in range(1, upto + 1):
        played(strategy, server_round)
    other.recall(strategy.memory())
    other.global_adapter = strategy.global_adapter
    assert other.left() == strategy.left()
    profile = CLIENTS[0].profile
    assert other.plan(profile, upto + 1) == strategy.plan(profile, upto + 1)
    played(strategy, upto + 1)
    played(other, upto + 1)
    assert other.left() == strategy.left()
