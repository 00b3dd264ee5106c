"""RBLA: each component is averaged over the clients that hold it."""

import numpy as np
from driving import MAX_RANK, Client, dense, merge, noise, strategy_named, update_of
from numpy.testing import assert_allclose

CLIENTS = [Client(r, n, i) for i, (r, n) in enumerate([(1, 10), (2, 25), (3, 7), (2, 31)])]


def test_each_component_is_the_mean_over_those_who_hold_it_and_the_last_one_stays():
    strategy = strategy_named("rbla")
    updates = [update_of(strategy, client, noise) for client in CLIENTS]

    after = merge(strategy, updates)

    for name, before in strategy.global_adapter.modules.items():
        for i in range(MAX_RANK):
            holders = [u for u in updates if u.adapter.modules[name].rank > i]
            weight = sum(u.num_examples for u in holders)
            a, b = before.lora_A[i].numpy(), before.lora_B[:, i].numpy()
            if holders:
                parts = [(u.num_examples / weight, u.adapter.modules[name]) for u in holders]
                a = sum(w * f.lora_A[i].double().numpy() for w, f in parts)
                b = sum(w * f.lora_B[:, i].double().numpy() for w, f in parts)
            assert_allclose(after[name].lora_A[i], a, atol=1e-6)
            assert_allclose(after[name].lora_B[:, i], b, atol=1e-6)


def test_is_hafls_adaptive_aggregation_over_prefixes():
    rbla = strategy_named("rbla")
    hafl = strategy_named("hafl", "strategy.selection=prefix", "strategy.scheme=truncation")
    one, other = (merge(s, [update_of(s, c, noise) for c in CLIENTS]) for s in (rbla, hafl))
    for name, factors in one.items():
        assert np.array_equal(dense(factors), dense(other[name]))
