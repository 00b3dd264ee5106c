"""FedSA-LoRA: what travels, what the mean is of, and what stays."""

import numpy as np
import torch
from driving import Client, merge, noise, strategy_named, update_of

CLIENTS = [Client(rank, n, i) for i, (rank, n) in enumerate([(1, 10), (3, 25), (2, 7)])]


def test_lora_a_alone_travels_in_both_directions():
    strategy, head = strategy_named("fedsa_lora"), 4 * (3 * 7 + 3)
    plan = strategy.plan(CLIENTS[1].profile, 1)
    assert strategy.payload_bytes(CLIENTS[1].profile) == (4 * 3 * (5 + 9) + head,) * 2
    for factors in strategy.dispatch(plan).modules.values():
        assert factors.rank == 3
        assert factors.lora_B.numel() == 0
    assert {m.factors for m in plan.modules.values()} == {"both"}
    assert {m.uploads for m in plan.modules.values()} == {"A"}


def test_lora_a_is_the_mean_over_its_holders_and_lora_b_stays():
    strategy = strategy_named("fedsa_lora")
    updates = [update_of(strategy, client, noise) for client in CLIENTS]

    after = merge(strategy, updates)

    for name, before in strategy.global_adapter.modules.items():
        assert torch.equal(after[name].lora_B, before.lora_B)
        for i in range(4):
            holders = [u for u in updates if u.adapter.modules[name].rank > i]
            rows = [u.adapter.modules[name].lora_A[i].double().numpy() for u in holders]
            weights = [u.num_examples for u in holders]
            expected = np.average(rows, axis=0, weights=weights) if rows else before.lora_A[i]
            np.testing.assert_allclose(after[name].lora_A[i], expected, rtol=1e-5)
