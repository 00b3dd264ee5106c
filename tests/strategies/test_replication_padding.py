"""Replication padding: what a client lacks is copied from those of the round's largest rank."""

import numpy as np
import pytest
from driving import MAX_RANK, Client, dense, merge, noise, strategy_named, update_of
from numpy.testing import assert_allclose

THREE_RANKS = [Client(r, n, i) for i, (r, n) in enumerate([(1, 10), (3, 25), (2, 7), (3, 31)])]
TWO_RANKS = [Client(r, n, i) for i, (r, n) in enumerate([(1, 10), (4, 25), (1, 7), (4, 31)])]


def padded(updates, name):
    """Return every upload at the largest rank, with its share of the examples."""
    factors = [u.adapter.modules[name] for u in updates]
    rank = max(f.rank for f in factors)
    largest = [(u.num_examples, f) for u, f in zip(updates, factors, strict=True) if f.rank == rank]
    weight = sum(n for n, _ in largest)
    pad_A = sum(n / weight * f.lora_A.double().numpy() for n, f in largest)
    pad_B = sum(n / weight * f.lora_B.double().numpy() for n, f in largest)
    total = sum(u.num_examples for u in updates)
    for u, f in zip(updates, factors, strict=True):
        A = np.concatenate([f.lora_A.double().numpy(), pad_A[f.rank :]])
        B = np.concatenate([f.lora_B.double().numpy(), pad_B[:, f.rank :]], axis=1)
        yield u.num_examples / total, A, B


@pytest.mark.parametrize("clients", [THREE_RANKS, THREE_RANKS[::-1], TWO_RANKS])
def test_is_the_plain_mean_of_the_padded_uploads(clients):
    strategy = strategy_named("replication_padding")
    updates = [update_of(strategy, client, noise) for client in clients]
    rank = max(client.rank for client in clients)

    after = merge(strategy, updates)

    for name, before in strategy.global_adapter.modules.items():
        uploads = list(padded(updates, name))
        assert_allclose(after[name].lora_A[:rank], sum(w * A for w, A, _ in uploads), atol=1e-6)
        assert_allclose(after[name].lora_B[:, :rank], sum(w * B for w, _, B in uploads), atol=1e-6)
        stays = range(rank, MAX_RANK)
        assert np.array_equal(dense(after[name].select(stays)), dense(before.select(stays)))


@pytest.mark.parametrize(("clients", "same"), [(TWO_RANKS, True), (THREE_RANKS, False)])
def test_is_rbla_where_there_are_two_ranks_and_only_there(clients, same):
    one, other = (
        merge(s, [update_of(s, client, noise) for client in clients])["dense"]
        for s in (strategy_named("replication_padding"), strategy_named("rbla"))
    )
    assert np.allclose(one.lora_B, other.lora_B, atol=1e-6) is same
