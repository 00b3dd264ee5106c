"""LoRA-FAIR: FedIT's factors, lora_B corrected toward the mean of products."""

import numpy as np
import pytest
from driving import Client, at_start, dense, merge, noise, strategy_named, update_of
from numpy.testing import assert_allclose

CLIENTS = [Client(3, n, i) for i, n in enumerate((10, 25, 7))]
SHARES = [10 / 42, 25 / 42, 7 / 42]


def means(updates, name):
    """Return ``(A, B, mean of products)`` in float64."""
    parts = [u.adapter.modules[name] for u in updates]
    A = sum(w * f.lora_A.double().numpy() for w, f in zip(SHARES, parts, strict=True))
    B = sum(w * f.lora_B.double().numpy() for w, f in zip(SHARES, parts, strict=True))
    return A, B, sum(w * dense(f) for w, f in zip(SHARES, parts, strict=True))


@pytest.mark.parametrize("regularization", [0.01, 2.0, 0.0])
def test_lora_B_is_corrected_by_the_regularized_least_squares(regularization):
    strategy = strategy_named("lora_fair", f"strategy.regularization={regularization}")
    updates = [update_of(strategy, c, noise) for c in CLIENTS]

    after = merge(strategy, updates)

    for name, before in strategy.global_adapter.modules.items():
        A, B, ideal = means(updates, name)
        # ||R - D A||^2 + lambda ||D||^2, as one least-squares problem for the columns of D^T
        left = np.vstack([A.T, np.sqrt(regularization) * np.eye(3)])
        right = np.vstack([(ideal - B @ A).T, np.zeros((3, len(B)))])
        D = np.linalg.lstsq(left, right, rcond=None)[0].T
        assert np.abs(D).max() > 0.01
        assert_allclose(after[name].lora_A[:3], A, atol=1e-6)
        assert_allclose(after[name].lora_B[:, :3], B + D, atol=1e-5)
        # what no client trained is as it was
        assert_allclose(after[name].lora_A[3:], before.lora_A[3:], atol=0)
        assert_allclose(after[name].lora_B[:, 3:], before.lora_B[:, 3:], atol=0)


def test_less_regularization_comes_closer_to_the_mean_of_products():
    def distances(regularization):
        strategy = strategy_named("lora_fair", f"strategy.regularization={regularization}")
        updates = [update_of(strategy, c, noise) for c in CLIENTS]
        after = merge(strategy, updates)
        for name, factors in after.items():
            A, B, ideal = means(updates, name)
            got = dense(factors.select(range(3)))
            plain = np.linalg.norm(B @ A - ideal)
            yield np.linalg.norm(got - ideal) / plain

    exact, usual, strong = (list(distances(value)) for value in (0, 0.3, 1e6))
    for a, b, c in zip(exact, usual, strong, strict=True):
        assert a < b < c
        assert c == pytest.approx(1, abs=1e-4)  # FedIT


def test_without_regularization_the_model_is_the_mean_on_the_rows_of_A():
    strategy = strategy_named("lora_fair", "strategy.regularization=0")
    updates = [update_of(strategy, c, noise) for c in CLIENTS]

    after = merge(strategy, updates)

    for name, factors in after.items():
        A, _, ideal = means(updates, name)
        onto_rows = np.linalg.pinv(A) @ A
        assert_allclose(dense(factors.select(range(3))), ideal @ onto_rows, atol=1e-5)


def test_the_first_round_is_fine_although_lora_B_was_zero():
    strategy, fedit = at_start(strategy_named("lora_fair")), at_start(strategy_named("fedit"))
    updates = [update_of(strategy, c, noise) for c in CLIENTS]

    corrected, plain = merge(strategy, updates), merge(fedit, updates)

    for name, factors in corrected.items():
        _, _, ideal = means(updates, name)
        error = np.linalg.norm(dense(factors) - ideal)
        assert error < np.linalg.norm(dense(plain[name]) - ideal)
