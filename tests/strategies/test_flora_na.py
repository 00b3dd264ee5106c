"""FLoRA-NA: two weights a client, for a product near the mean of products."""

from itertools import pairwise

import numpy as np
import pytest
from driving import Client, at_start, dense, merge, noise, nothing, strategy_named, update_of
from numpy.testing import assert_allclose

CLIENTS = [Client(3, n, i) for i, n in enumerate((10, 25, 7, 18))]
SHARES = np.array([10, 25, 7, 18]) / 60


def uploads(updates, name):
    parts = [u.adapter.modules[name] for u in updates]
    return [f.lora_A.double().numpy() for f in parts], [f.lora_B.double().numpy() for f in parts]


def mean_of_products(As, Bs):
    return sum(w * B @ A for w, A, B in zip(SHARES, As, Bs, strict=True))


def alternated(As, Bs, sweeps):
    """Return ``(A, B)`` by least squares over dense matrices, a column for each client."""
    ideal = mean_of_products(As, Bs).ravel()
    P, Q = SHARES.copy(), SHARES.copy()
    for _ in range(sweeps):
        A = np.tensordot(P, As, 1)
        columns = np.stack([(B @ A).ravel() for B in Bs], axis=1)
        Q = Q + np.linalg.lstsq(columns, ideal - columns @ Q, rcond=None)[0]
        B = np.tensordot(Q, Bs, 1)
        columns = np.stack([(B @ A).ravel() for A in As], axis=1)
        P = P + np.linalg.lstsq(columns, ideal - columns @ P, rcond=None)[0]
    return np.tensordot(P, As, 1), np.tensordot(Q, Bs, 1)


@pytest.mark.parametrize("sweeps", [1, 2, 20])
def test_alternates_least_squares_over_the_clients_weights(sweeps):
    strategy = strategy_named("flora_na", f"strategy.sweeps={sweeps}")
    updates = [update_of(strategy, c, noise) for c in CLIENTS]

    after = merge(strategy, updates)

    for name, before in strategy.global_adapter.modules.items():
        A, B = alternated(*uploads(updates, name), sweeps)
        assert_allclose(after[name].lora_A[:3], A, atol=1e-5)
        assert_allclose(after[name].lora_B[:, :3], B, atol=1e-5)
        assert_allclose(after[name].lora_A[3:], before.lora_A[3:], atol=0)
        assert_allclose(after[name].lora_B[:, 3:], before.lora_B[:, 3:], atol=0)


def test_every_sweep_comes_closer_to_the_mean_of_products_than_fedit():
    fedit = strategy_named("fedit")
    updates = [update_of(fedit, c, noise) for c in CLIENTS]
    plain = merge(fedit, updates)
    for name, factors in plain.items():
        ideal = mean_of_products(*uploads(updates, name))
        distances = []
        for sweeps in (0, 1, 2, 5, 20):
            after = merge(strategy_named("flora_na", f"strategy.sweeps={sweeps}"), updates)
            distances.append(np.linalg.norm(dense(after[name].select(range(3))) - ideal))
        assert distances[0] == pytest.approx(
            np.linalg.norm(dense(factors.select(range(3))) - ideal), rel=1e-6
        )
        assert distances[1] < 0.99 * distances[0]
        assert all(b <= a + 1e-6 for a, b in pairwise(distances))


def test_components_that_are_zero_keep_what_they_learn_with():
    strategy = at_start(strategy_named("flora_na"))

    after = merge(strategy, [update_of(strategy, c, nothing) for c in CLIENTS])

    for name, before in strategy.global_adapter.modules.items():
        assert_allclose(after[name].lora_A, before.lora_A, atol=1e-6)


def test_what_a_client_did_not_train_counts_as_it_was():
    strategy = strategy_named("flora_na")
    updates = [update_of(strategy, Client(r, 20, r), noise) for r in (2, 3)]  # one was cut

    after = merge(strategy, updates)

    for name, before in strategy.global_adapter.modules.items():
        whole = [before.replace(u.components(name), u.adapter.modules[name]) for u in updates]
        ideal = sum(dense(f) / 2 for f in whole)
        A, B = (
            sum(getattr(f, n).double().numpy() / 2 for f in whole) for n in ("lora_A", "lora_B")
        )
        assert np.linalg.norm(dense(after[name]) - ideal) < np.linalg.norm(B @ A - ideal)
