"""RoLoRA: the turns, the mean of each, and what it costs."""

import numpy as np
import torch
from driving import MAX_RANK, Client, merge, noise, strategy_named, update_of

CLIENTS = [Client(rank, n, i) for i, (rank, n) in enumerate([(1, 10), (3, 25), (2, 7)])]


def test_the_factors_take_turns_and_lora_b_begins():
    strategy = strategy_named("rolora")
    factors = [
        {m.factors for m in strategy.plan(CLIENTS[0].profile, t).modules.values()}
        for t in (1, 2, 3)
    ]
    assert factors == [{"B"}, {"A"}, {"B"}]


def test_two_rounds_by_the_equation():
    strategy = strategy_named("rolora")
    expected = {
        name: [f.lora_A.double().numpy(), f.lora_B.double().numpy()]
        for name, f in strategy.global_adapter.modules.items()
    }
    for server_round, side in ((1, 1), (2, 0)):
        updates = [update_of(strategy, client, noise, server_round) for client in CLIENTS]
        after = merge(strategy, updates)
        for name, pair in expected.items():
            new = pair[side].copy()
            for i in range(MAX_RANK):
                where = np.s_[i] if side == 0 else np.s_[:, i]
                holders = [u for u in updates if i < u.adapter.modules[name].rank]
                if not holders:
                    continue
                theirs = [u.adapter.modules[name] for u in holders]
                vectors = [(f.lora_A, f.lora_B)[side].double().numpy()[where] for f in theirs]
                new[where] = np.average(vectors, axis=0, weights=[u.num_examples for u in holders])
            pair[side] = new
            np.testing.assert_allclose(after[name].lora_A, pair[0], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(after[name].lora_B, pair[1], rtol=1e-5, atol=1e-6)
        strategy.global_adapter = strategy.global_adapter.__class__(
            after, strategy.global_adapter.head
        )


def test_at_one_rank_the_mean_of_products_is_exact_in_both_turns():
    strategy = strategy_named("rolora")
    for server_round in (1, 2):
        updates = [
            update_of(strategy, Client(MAX_RANK, n, i), noise, server_round)
            for i, n in enumerate((4, 9, 30))
        ]
        after = merge(strategy, updates)
        for name, factors in after.items():
            mean = sum(
                u.num_examples / 43 * u.adapter.modules[name].delta_weight().double()
                for u in updates
            )
            torch.testing.assert_close(factors.delta_weight().double(), mean, rtol=1e-4, atol=1e-5)


def test_an_upload_has_one_factor():
    strategy, head = strategy_named("rolora"), 4 * (3 * 7 + 3)
    assert strategy.payload_bytes(CLIENTS[1].profile) == (
        4 * 3 * (7 + 5 + 6 + 9) + head,
        4 * 3 * (7 + 6) + head,
    )
    in_even = strategy.plan(CLIENTS[1].profile, 2).upload_bytes(strategy.layer_shapes())
    assert in_even == 4 * 3 * (5 + 9)
