"""Server optimizers: steps on the aggregated change, and the moments from round to round."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from driving import (
    HEAD,
    MAX_RANK,
    STRATEGIES,
    Client,
    clients_for,
    merge,
    noise,
    run_options,
    strategy_named,
    update_of,
)

from hafl_app.lowrank.factors import Adapter
from hafl_app.privacy.mechanism import PrivacyOptions
from hafl_app.server.aggregation import merge as merge_into
from hafl_app.server.checkpoint_store import CheckpointStore
from hafl_app.server.compatibility import no_server_optimizer
from hafl_app.server.method import StrategyError
from hafl_app.server.settings import ServerOptimizerSettings
from hafl_app.server.snapshot import Snapshot, flatten, restore, take_snapshot, unflatten

KINDS = ("momentum", "adam", "yogi")
RATE, BETA1, BETA2, TAU = 0.3, 0.6, 0.7, 0.05
COMPOSED = [n for n in STRATEGIES if not no_server_optimizer(strategy_named(n).traits)]
REFUSED = sorted({*STRATEGIES} - {*COMPOSED})
PLAIN = ServerOptimizerSettings("momentum", learning_rate=1.0, beta1=0.0)


def settings_of(kind):
    return ServerOptimizerSettings(kind, RATE, BETA1, BETA2, TAU)


def with_optimizer(name, settings, **changes):
    strategy = strategy_named(name)
    strategy.options = run_options(strategy.options, server_optimizer=settings, **changes)
    return strategy


def drifted(strategy, clients, server_round):
    """Return the updates of a round; its noise is its own, and the head moves too."""
    updates = []
    for client in clients:
        drawn = replace(client, noise_seed=10 * server_round + client.partition_id)
        with torch.random.fork_rng():
            torch.manual_seed(server_round)  # of the importance that clients measure
            update = update_of(strategy, drawn, noise, server_round)
        head = {n: t + 0.1 * server_round + client.rank for n, t in update.adapter.head.items()}
        updates.append(replace(update, adapter=update.adapter.with_head(head)))
    return updates


def next_round(strategy, updates, server_round=1):
    """Merge as a coordinator does, with its moments, and keep the result."""
    strategy.global_adapter = merge_into(
        strategy,
        strategy.global_adapter,
        updates,
        server_round=server_round,
        optimizer=strategy.coordinator.server_optimizer,
    )


def assert_equal(one: Adapter, other: Adapter):
    for name, tensor in other.tensors().items():
        assert torch.equal(one.tensors()[name], tensor), name


class Oracle:
    """Algorithm 2 of Reddi et al. and FedAvgM, for one tensor, number by number in float64."""

    def __init__(self, kind):
        self.kind, self.m, self.v = kind, 0.0, TAU**2

    def step(self, before, merged):
        delta = merged - before
        if self.kind == "momentum":
            self.m = BETA1 * self.m + delta
            return before + RATE * self.m
        self.m = BETA1 * self.m + (1 - BETA1) * delta
        if self.kind == "adam":
            self.v = BETA2 * self.v + (1 - BETA2) * delta**2
        else:
            self.v = self.v - (1 - BETA2) * delta**2 * np.sign(self.v - delta**2)
        return before + RATE * self.m / (np.sqrt(self.v) + TAU)


class TestStep:
    @pytest.mark.parametrize("kind", KINDS)
    def test_is_the_papers_on_the_weighted_mean_of_the_changes(self, kind):
        strategy = with_optimizer("fedit", settings_of(kind))
        clients = [Client(MAX_RANK, 10, 0), Client(MAX_RANK, 25, 1), Client(MAX_RANK, 7, 2)]
        tensors = strategy.global_adapter.tensors()
        expected = {name: tensor.double().numpy() for name, tensor in tensors.items()}
        oracles = {name: Oracle(kind) for name in tensors}

        for server_round in (1, 2, 3):
            updates = drifted(strategy, clients, server_round)
            for name, oracle in oracles.items():
                uploads = [u.adapter.tensors()[name].double().numpy() for u in updates]
                mean = (10 * uploads[0] + 25 * uploads[1] + 7 * uploads[2]) / 42
                expected[name] = oracle.step(expected[name], mean)
            next_round(strategy, updates, server_round)

        after = strategy.global_adapter.tensors()
        assert {"head/weight", "lora_A/query", "lora_B/query"} <= set(after)
        for name, numbers in expected.items():
            np.testing.assert_allclose(after[name].numpy(), numbers, rtol=2e-5, atol=2e-6)

    def test_yogi_and_adam_part_where_changes_shrink(self):
        after = {}
        for kind in ("adam", "yogi"):
            strategy = with_optimizer("fedit", settings_of(kind))
            for server_round in (1, 2):
                updates = drifted(strategy, [Client(MAX_RANK, 5, 0)], server_round)
                next_round(strategy, updates, server_round)
            after[kind] = strategy.global_adapter.modules["query"].lora_A
        assert not torch.allclose(after["adam"], after["yogi"])

    @pytest.mark.parametrize("name", COMPOSED)
    def test_of_rate_one_without_momentum_is_the_methods_own(self, name):
        results = []
        for settings in (ServerOptimizerSettings(), PLAIN):
            strategy = with_optimizer(name, settings)
            for server_round in (1, 2):
                updates = drifted(strategy, clients_for(name), server_round)
                next_round(strategy, updates, server_round)
            results.append(strategy.global_adapter.tensors())
        for key, tensor in results[0].items():
            torch.testing.assert_close(results[1][key], tensor, rtol=0, atol=0)

    @pytest.mark.parametrize("name", STRATEGIES)
    def test_of_none_keeps_nothing(self, name):
        strategy = strategy_named(name)
        next_round(strategy, drifted(strategy, clients_for(name), 1))
        assert not flatten(strategy.coordinator.server_optimizer.memory())

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", COMPOSED)
    def test_moves_away_from_the_methods_own(self, name, kind):
        plain, stepped = strategy_named(name), with_optimizer(name, settings_of(kind))
        updates = drifted(plain, clients_for(name), 1)
        next_round(plain, updates)
        next_round(stepped, updates)
        ours, theirs = stepped.global_adapter.tensors(), plain.global_adapter.tensors()
        factors = ("lora_A/query", "lora_B/query")  # some methods train one of them
        assert not all(torch.allclose(ours[name], theirs[name]) for name in factors)
        assert not torch.allclose(ours["head/weight"], theirs["head/weight"])

    def test_null_rates_are_those_of_the_settings_page(self):
        rates = {kind: ServerOptimizerSettings(kind).rate for kind in KINDS}
        assert rates == {"momentum": 1.0, "adam": 5e-3, "yogi": 5e-3}


class TestUntrained:
    @pytest.mark.parametrize("kind", KINDS)
    def test_components_wait_with_their_moments(self, kind):
        strategy = with_optimizer("rbla", settings_of(kind))
        next_round(strategy, drifted(strategy, [Client(4, 10, 0)], 1))
        before = strategy.global_adapter
        moments = flatten(strategy.coordinator.server_optimizer.memory(), "/")

        next_round(strategy, drifted(strategy, [Client(2, 10, 0)], 2), 2)

        for name, factors in strategy.global_adapter.modules.items():
            was = before.modules[name]
            assert torch.equal(factors.lora_A[2:], was.lora_A[2:])
            assert torch.equal(factors.lora_B[:, 2:], was.lora_B[:, 2:])
            assert (factors.lora_A[:2] != was.lora_A[:2]).any(1).all()
        after = flatten(strategy.coordinator.server_optimizer.memory(), "/")
        for name, moment in after.items():
            if "lora_A/" in name:
                assert torch.equal(moment[2:], moments[name][2:])
                assert (moment[:2] != moments[name][:2]).any(1).all()
            if "lora_B/" in name:
                assert torch.equal(moment[:, 2:], moments[name][:, 2:])

    def test_moments_go_on_when_the_component_comes_back(self):
        strategy = with_optimizer("rbla", settings_of("momentum"))
        next_round(strategy, drifted(strategy, [Client(4, 10, 0)], 1))
        next_round(strategy, drifted(strategy, [Client(2, 10, 0)], 2), 2)
        before = strategy.global_adapter.modules["query"].lora_A
        moment = strategy.coordinator.server_optimizer.memory()["first"]["lora_A/query"]
        updates = drifted(strategy, [Client(4, 10, 0)], 3)

        next_round(strategy, updates, 3)

        change = updates[0].adapter.modules["query"].lora_A - before
        expected = before + RATE * (BETA1 * moment + change)
        torch.testing.assert_close(strategy.global_adapter.modules["query"].lora_A, expected)
        assert moment[2:].any(1).all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_factors_stay(self, kind):
        strategy = with_optimizer("ffa_lora", settings_of(kind))
        before = strategy.global_adapter
        for server_round in (1, 2):
            updates = drifted(strategy, clients_for("ffa_lora"), server_round)
            next_round(strategy, updates, server_round)
        for name, factors in before.modules.items():
            assert torch.equal(strategy.global_adapter.modules[name].lora_A, factors.lora_A)

    def test_components_that_a_method_clears_are_cleared(self):
        """Zero padding shrinks what no participant holds: its rule, not the optimizer's."""
        strategy = with_optimizer("zero_padding", settings_of("adam"))
        next_round(strategy, drifted(strategy, [Client(2, 10, 0)], 1))
        assert not strategy.global_adapter.modules["query"].lora_B[:, 2:].any()

    @pytest.mark.parametrize("head", ["frozen", "local"])
    def test_a_head_that_does_not_travel_stays(self, head):
        strategy = with_optimizer("fedit", settings_of("adam"), head=head)
        before = strategy.global_adapter.head
        updates = [update_of(strategy, Client(3, 10, 0), noise)]
        next_round(strategy, [replace(u, adapter=u.adapter.with_head({})) for u in updates])
        assert all(torch.equal(strategy.global_adapter.head[n], t) for n, t in before.items())
        kept = flatten(strategy.coordinator.server_optimizer.memory(), "/")
        assert kept
        assert not any("head/" in name for name in kept)


class TestCentralPrivacy:
    def test_what_steps_follows_from_the_plans_alone(self):
        """Who came must not show: with nobody there the moments go on by noise alone."""
        privacy = PrivacyOptions("central_dp", clip_norm=1.0, noise_multiplier=1.0, noise_key="k")
        strategy = with_optimizer("zero_padding", settings_of("momentum"), privacy=privacy)
        nodes = [Client(2, 10, 0).profile, Client(3, 10, 1).profile]
        optimizer = strategy.coordinator.server_optimizer

        after = merge_into(strategy, strategy.global_adapter, [], nodes=nodes, optimizer=optimizer)

        moments = flatten(optimizer.memory(), "/")["first/lora_A/query"]
        assert moments[:3].all()
        assert not moments[3:].any()
        assert not torch.equal(after.head["weight"], strategy.global_adapter.head["weight"])

    def test_the_step_is_on_the_noisy_release(self):
        privacy = PrivacyOptions("central_dp", clip_norm=1.0, noise_multiplier=1.0, noise_key="k")
        nodes = [Client(4, 10, 0).profile]
        released, stepped = (
            merge_into(s, s.global_adapter, [], nodes=nodes).tensors()
            for s in (
                with_optimizer("zero_padding", ServerOptimizerSettings(), privacy=privacy),
                with_optimizer("zero_padding", settings_of("momentum"), privacy=privacy),
            )
        )
        before = strategy_named("zero_padding").global_adapter.tensors()
        for name, tensor in before.items():
            expected = tensor + RATE * (released[name] - tensor)
            torch.testing.assert_close(stepped[name], expected)


class TestMemory:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_resumed_run_steps_bit_for_bit(self, kind, tmp_path):
        whole = with_optimizer("hafl", settings_of(kind))
        for server_round in (1, 2):
            next_round(whole, drifted(whole, clients_for("hafl"), server_round), server_round)
        snapshot = take_snapshot(whole)
        store = CheckpointStore(tmp_path)
        store.save(2, flatten(snapshot.tree), dict(snapshot.state))
        next_round(whole, drifted(whole, clients_for("hafl"), 3), 3)

        resumed = with_optimizer("hafl", settings_of(kind))
        read = store.latest()
        restore(resumed, Snapshot(unflatten(read.tensors), read.state))
        next_round(resumed, drifted(resumed, clients_for("hafl"), 3), 3)

        assert_equal(resumed.global_adapter, whole.global_adapter)

    def test_a_checkpoint_of_a_run_without_one_is_read(self):
        strategy = strategy_named("hafl")
        snapshot = take_snapshot(strategy)
        tree = {name: branch for name, branch in snapshot.tree.items() if branch}
        tree.pop("server_optimizer")
        restore(strategy, Snapshot(tree, snapshot.state))
        assert not flatten(strategy.coordinator.server_optimizer.memory())

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_round_that_fails_leaves_no_trace(self, kind):
        strategy = with_optimizer("rbla", settings_of(kind))
        next_round(strategy, drifted(strategy, clients_for("rbla"), 1))
        moments = flatten(strategy.coordinator.server_optimizer.memory())
        moments = {name: tensor.clone() for name, tensor in moments.items()}
        before = strategy.global_adapter

        def breaking():
            yield drifted(strategy, clients_for("rbla"), 2)[0]
            raise RuntimeError("too few replies")

        with pytest.raises(RuntimeError, match="too few replies"):
            strategy.coordinator._advance(2, breaking())

        assert strategy.global_adapter is before
        for name, tensor in flatten(strategy.coordinator.server_optimizer.memory()).items():
            assert torch.equal(tensor, moments[name])

    def test_the_coordinator_keeps_the_moments(self):
        strategy = with_optimizer("rbla", settings_of("momentum"))
        strategy.coordinator._advance(1, drifted(strategy, clients_for("rbla"), 1))
        kept = flatten(strategy.coordinator.server_optimizer.memory(), "/")
        assert {f"first/head/{name}" for name in HEAD} <= set(kept)


class TestRefusals:
    @pytest.mark.parametrize("name", REFUSED)
    def test_a_method_whose_components_are_new_every_round(self, name):
        strategy = with_optimizer(name, ServerOptimizerSettings("adam"))
        with pytest.raises(
            StrategyError, match=r"server_optimizer\.kind=adam is refused for strategy="
        ):
            strategy.check([3, 3])

    def test_are_of_these_methods(self):
        assert {"flexlora", "flexlora_change", "flora", "fedex_lora"} <= set(REFUSED)
        assert {"fedit", "zero_padding", "hafl", "hetlora", "ffa_lora", "rbla"} <= set(COMPOSED)

    def test_none_is_always_accepted(self):
        for name in STRATEGIES:
            strategy_named(name).check([3, 3])


def test_merging_by_itself_starts_from_no_moments():
    strategy = with_optimizer("rbla", settings_of("momentum"))
    updates = drifted(strategy, clients_for("rbla"), 1)
    once, twice = merge(strategy, updates), merge(strategy, updates)
    assert torch.equal(once["query"].lora_A, twice["query"].lora_A)
