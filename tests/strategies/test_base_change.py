"""What changes the base: held by all, trained by none, counted, kept, and exported."""

import pytest
import torch
from driving import (
    BASE_RANK,
    MAX_RANK,
    SHAPES,
    STRATEGIES,
    advance,
    clients_for,
    dense,
    noise,
    run_options,
    strategy_named,
    update_of,
)
from numpy.testing import assert_allclose

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.svd import truncated_svd
from hafl_app.server.snapshot import adapter_of, adapter_tree
from hafl_app.strategies.base_change import extended
from hafl_app.training.peft_format import factor_tensors

CHANGING = [name for name in STRATEGIES if strategy_named(name).traits.changes_base]
HEAD_BYTES = 4 * (3 * 7 + 3)


@pytest.fixture(params=CHANGING)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_there_are_such_methods():
    assert "flora" in CHANGING


def test_every_client_holds_the_change_and_trains_none_of_it(name):
    strategy = strategy_named(name)
    for client in clients_for(name):
        for module in strategy.plan(client.profile, 1).modules.values():
            assert module.held[-BASE_RANK:] == tuple(range(MAX_RANK, MAX_RANK + BASE_RANK))
            assert module.trainable == tuple(range(client.rank))


def test_the_change_counts_in_the_bytes_down_and_not_in_those_up(name):
    strategy = strategy_named(name)
    profile = clients_for(name)[-1].profile

    down, up = strategy.payload_bytes(profile)

    held = {n: len(m.held) for n, m in strategy.plan(profile, 1).modules.items()}
    numbers = [s.out_features + s.in_features for s in SHAPES.values()]
    assert set(held.values()) <= {MAX_RANK + BASE_RANK, profile.rank + BASE_RANK}
    assert down == HEAD_BYTES + 4 * sum(held[n] * k for n, k in zip(SHAPES, numbers, strict=True))
    assert up == HEAD_BYTES + 4 * profile.rank * sum(numbers)


def test_streaming_gives_the_same_model(name):
    strategy, streaming = strategy_named(name), strategy_named(name)
    streaming.options = run_options(streaming.options, streaming=True)
    for one in (strategy, streaming):
        advance(one, [update_of(one, c, noise) for c in clients_for(name)])

    for module, factors in strategy.global_adapter.modules.items():
        assert_allclose(dense(streaming.global_adapter.modules[module]), dense(factors), atol=1e-5)


def test_its_rank_stays_within_the_weights(name):
    strategy = strategy_named(name)
    ranks = []
    for server_round in range(1, 8):
        updates = [update_of(strategy, c, noise, server_round) for c in clients_for(name)]
        advance(strategy, updates)
        ranks.append({n: f.rank - MAX_RANK for n, f in strategy.global_adapter.modules.items()})

    assert any(ranks[-1].values())
    for module, shape in SHAPES.items():
        assert max(r[module] for r in ranks) <= min(shape.out_features, shape.in_features)


def test_a_run_goes_on_from_its_checkpoint_as_if_never_interrupted(name):
    strategy, resumed = strategy_named(name), strategy_named(name)
    clients = clients_for(name)
    for server_round in (1, 2):
        advance(strategy, [update_of(strategy, c, noise, server_round) for c in clients])
    resumed.global_adapter = adapter_of(adapter_tree(strategy.global_adapter))
    resumed.recall(strategy.memory())

    for one in (strategy, resumed):
        advance(one, [update_of(one, c, noise, 3) for c in clients])

    for module, factors in strategy.global_adapter.modules.items():
        assert torch.equal(factors.lora_A, resumed.global_adapter.modules[module].lora_A)
        assert torch.equal(factors.lora_B, resumed.global_adapter.modules[module].lora_B)


def test_an_export_has_all_of_it_in_the_format_of_peft(name):
    strategy = strategy_named(name)
    advance(strategy, [update_of(strategy, c, noise) for c in clients_for(name)])
    modules = strategy.global_adapter.modules

    tensors = factor_tensors(Adapter(modules))

    for module, factors in modules.items():
        lora_A, lora_B = (
            tensors[f"base_model.model.{module}.lora_{which}.weight"].double() for which in "AB"
        )
        assert_allclose(lora_B @ lora_A, dense(factors), atol=1e-6)


def test_a_slice_of_the_adapter_is_of_all_that_was_learned(name):
    strategy = strategy_named(name)
    advance(strategy, [update_of(strategy, c, noise) for c in clients_for(name)])

    for factors in strategy.global_adapter.modules.values():
        u, s, vt = torch.linalg.svd(torch.from_numpy(dense(factors)))
        best = u[:, :2] * s[:2] @ vt[:2]
        assert_allclose(dense(truncated_svd(factors, 2)), best, atol=1e-5)


class TestExtended:
    def random(self, rank: int, seed: int) -> LoraFactors:
        generator = torch.Generator().manual_seed(seed)
        return LoraFactors(
            torch.randn(rank, 5, generator=generator), torch.randn(7, rank, generator=generator)
        )

    def test_is_the_sum_at_the_least_rank(self):
        one, other = self.random(2, 0), self.random(2, 1)

        both, same = extended(one, other), extended(one, one.scale(2.0))

        assert both.rank == 4
        assert same.rank == 2
        assert_allclose(dense(both), dense(one) + dense(other), atol=1e-5)
        assert_allclose(dense(same), 3 * dense(one), atol=1e-5)

    def test_cancels_to_nothing_but_rounding(self):
        one = self.random(3, 0)
        assert extended(one, one.scale(-1.0)).rank == 0

    def test_keeps_the_base_to_the_bit_where_nothing_is_added(self):
        one = self.random(3, 0)
        assert extended(one, self.random(0, 1)) is one
