"""FedEx-LoRA: FedIT's factors, and a residual that makes the mean of products exact."""

from driving import (
    MAX_RANK,
    Client,
    advance,
    at_start,
    dense,
    merge,
    noise,
    strategy_named,
    update_of,
)
from numpy.testing import assert_allclose

CLIENTS = [Client(3, n, i) for i, n in enumerate((10, 25, 7))]
SHARES = [10 / 42, 25 / 42, 7 / 42]


def test_factors_are_the_mean_and_the_base_gains_what_their_product_lacks():
    strategy = at_start(strategy_named("fedex_lora"))
    base = dict.fromkeys(strategy.global_adapter.modules, 0.0)
    for server_round in (1, 2, 3):
        updates = [update_of(strategy, c, noise, server_round) for c in CLIENTS]
        advance(strategy, updates)

        for name, factors in strategy.global_adapter.modules.items():
            parts = [u.adapter.modules[name] for u in updates]
            A = sum(w * f.lora_A.double().numpy() for w, f in zip(SHARES, parts, strict=True))
            B = sum(w * f.lora_B.double().numpy() for w, f in zip(SHARES, parts, strict=True))
            residual = sum(w * dense(f) for w, f in zip(SHARES, parts, strict=True)) - B @ A
            base[name] = base[name] + residual
            assert_allclose(factors.lora_A[:3], A, atol=1e-6)
            assert_allclose(factors.lora_B[:, :3], B, atol=1e-6)
            assert abs(residual).max() > 0.01
            assert_allclose(
                dense(factors.select(range(MAX_RANK, factors.rank))), base[name], atol=1e-5
            )


def test_the_residual_is_as_low_in_rank_as_the_paper_says():
    strategy = at_start(strategy_named("fedex_lora"))
    clients = [Client(1, n, i) for i, n in enumerate((10, 25))]
    advance(strategy, [update_of(strategy, c, noise) for c in clients])

    for factors in strategy.global_adapter.modules.values():
        assert 0 < factors.rank - MAX_RANK <= 2 * 1


def test_clients_that_agree_leave_the_base_alone():
    strategy = strategy_named("fedex_lora")
    clients = [Client(3, n, i, noise_seed=5) for i, n in enumerate((4, 9, 30))]

    after = merge(strategy, [update_of(strategy, c, noise) for c in clients])

    for name, factors in strategy.global_adapter.modules.items():
        assert after[name].rank == factors.rank
        assert (after[name].lora_A[MAX_RANK:] == factors.lora_A[MAX_RANK:]).all()
