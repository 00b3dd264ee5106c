"""Laws that every method in conf/strategy must obey, or declare broken with the reason."""

import copy
from dataclasses import replace

import pytest
import torch
from driving import (
    MAX_RANK,
    STRATEGIES,
    Client,
    clients_for,
    means_over_trainers,
    merge,
    model_after,
    noise,
    nothing,
    scaled_examples,
    strategy_named,
    update_of,
)

from hafl_app.lowrank.cores import with_cores
from hafl_app.lowrank.factors import LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.strategies.base import HeterogeneousLora

TOLERANCE = 1e-6


def relative_difference(got: LoraFactors, expected: torch.Tensor) -> float:
    difference = got.delta_weight().double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def assert_same_products(
    got: dict[str, LoraFactors], expected: dict[str, LoraFactors], tolerance: float = TOLERANCE
) -> None:
    for name, factors in expected.items():
        assert relative_difference(got[name], factors.delta_weight()) < tolerance, name


@pytest.fixture(params=STRATEGIES)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


def skip_if_broken(name: str, law: str) -> None:
    reason = strategy_named(name).traits.breaks.get(law)
    if reason is not None:
        assert "arXiv" in reason or "section" in reason, "a broken law names its source"
        pytest.skip(f"{name} breaks the law of {law}: {reason}")


def test_there_are_strategies():
    assert {"fedit", "zero_padding", "hafl"} <= set(STRATEGIES)


class TestLaws:
    def test_order_of_the_fold_does_not_matter(self, name):
        strategy = strategy_named(name)
        updates = [update_of(strategy, client, noise) for client in clients_for(name)]

        forward = merge(copy.deepcopy(strategy), updates)
        backward = merge(copy.deepcopy(strategy), updates[::-1])

        assert_same_products(backward, forward)

    @pytest.mark.parametrize("copies", [1, 3])
    def test_clients_that_change_nothing_change_nothing(self, name, copies):
        skip_if_broken(name, "nothing lost")
        strategy = strategy_named(name)
        before = dict(strategy.global_adapter.modules)
        clients = [Client(MAX_RANK, 5 + 3 * i, i) for i in range(copies)]

        after = merge(strategy, [update_of(strategy, client, nothing) for client in clients])

        assert_same_products(after, before)

    def test_one_client_is_returned_as_it_is(self, name):
        skip_if_broken(name, "nothing lost")
        strategy = strategy_named(name)
        update = update_of(strategy, Client(MAX_RANK, 9, 0), noise)

        after = merge(strategy, [update])

        assert_same_products(after, model_after(update))

    def test_identical_clients_are_returned_as_one(self, name):
        skip_if_broken(name, "nothing lost")
        strategy = strategy_named(name)
        clients = [Client(MAX_RANK, n, i, noise_seed=5) for i, n in enumerate((4, 9, 30))]
        updates = [update_of(strategy, client, noise) for client in clients]

        after = merge(strategy, updates)

        assert_same_products(after, model_after(updates[0]))

    def test_equal_ranks_reduce_to_the_stated_form(self, name):
        skip_if_broken(name, "homogeneous form")
        strategy = strategy_named(name)
        clients = [Client(MAX_RANK, n, i) for i, n in enumerate((4, 9, 30))]
        updates = [update_of(strategy, client, noise) for client in clients]

        after = merge(strategy, updates)

        total = sum(u.num_examples for u in updates)
        for module in after:
            shares = [(u.num_examples / total, model_after(u)[module]) for u in updates]
            if strategy.traits.homogeneous_form == "factor mean":
                expected = sum(w * f.lora_B.double() for w, f in shares) @ sum(
                    w * f.lora_A.double() for w, f in shares
                )
            else:
                expected = sum(w * (f.lora_B.double() @ f.lora_A.double()) for w, f in shares)
            if strategy.traits.homogeneous_form == "product mean":
                # More directions than the global rank holds: the best approximation is left.
                u, s, vt = torch.linalg.svd(expected)
                expected = u[:, :MAX_RANK] * s[:MAX_RANK] @ vt[:MAX_RANK]
            assert relative_difference(after[module], expected) < TOLERANCE

    def test_scaling_all_num_examples_changes_nothing(self, name):
        strategy = strategy_named(name)
        updates = [update_of(strategy, client, noise) for client in clients_for(name)]

        once = merge(copy.deepcopy(strategy), updates)
        many = merge(copy.deepcopy(strategy), scaled_examples(updates, 1000))

        assert_same_products(many, once)

    def test_num_examples_count(self, name):
        skip_if_broken(name, "num_examples")
        strategy = strategy_named(name)
        updates = [update_of(strategy, client, noise) for client in clients_for(name)]
        heavier = [
            replace(u, num_examples=u.num_examples + 500 * (i == 2)) for i, u in enumerate(updates)
        ]

        before = merge(copy.deepcopy(strategy), updates)
        after = merge(copy.deepcopy(strategy), heavier)

        assert any(relative_difference(after[m], before[m].delta_weight()) > 1e-3 for m in before)

    def test_a_client_split_in_two_halves_changes_nothing(self, name):
        skip_if_broken(name, "split clients")
        strategy = strategy_named(name)
        updates = [update_of(strategy, client, noise) for client in clients_for(name)]
        updates = scaled_examples(updates, 2)
        half = replace(updates[1], num_examples=updates[1].num_examples // 2)

        whole = merge(copy.deepcopy(strategy), updates)
        split = merge(copy.deepcopy(strategy), [updates[0], half, half, *updates[2:]])

        assert_same_products(split, whole)

    def test_a_fold_of_sums_takes_means_for_updates(self, name):
        strategy = strategy_named(name)
        if not strategy.traits.sums_updates:
            pytest.skip(f"{name} needs single updates")
        plan = strategy.plan(Client(MAX_RANK, 5, 0).profile, 1)
        assert (plan.importance, plan.tail) == ("none", None)  # not in a sum
        check_sums(strategy, clients_for(name))

    def test_no_argument_is_changed(self, name):
        strategy = strategy_named(name)
        updates = [update_of(strategy, client, noise) for client in clients_for(name)]
        untouched = copy.deepcopy((updates, strategy.global_adapter))

        merge(strategy, updates)

        for update, before in zip(updates, untouched[0], strict=True):
            for module, factors in update.adapter.modules.items():
                assert torch.equal(factors.lora_A, before.adapter.modules[module].lora_A)
                assert torch.equal(factors.lora_B, before.adapter.modules[module].lora_B)
        for module, factors in strategy.global_adapter.modules.items():
            assert torch.equal(factors.lora_B, untouched[1].modules[module].lora_B)

    def test_dtype_and_shape_are_kept(self, name):
        strategy = strategy_named(name)
        after = merge(strategy, [update_of(strategy, c, noise) for c in clients_for(name)])

        for module, before in strategy.global_adapter.modules.items():
            assert after[module].lora_A.dtype == after[module].lora_B.dtype == torch.float32
            assert after[module].in_features == before.in_features
            assert after[module].out_features == before.out_features
            most = MAX_RANK + strategy.traits.changes_base * min(
                before.out_features, before.in_features
            )
            assert MAX_RANK <= after[module].rank <= most

    def test_a_component_without_content_can_still_learn(self, name):
        strategy = strategy_named(name)
        clients = clients_for(name)
        for server_round in range(1, 4):
            merged = merge(
                strategy, [update_of(strategy, c, nothing, server_round) for c in clients]
            )
            strategy.global_adapter = replace(strategy.global_adapter, modules=merged)

        for factors in strategy.global_adapter.modules.values():
            dead = (factors.lora_A.norm(dim=1) == 0) & (factors.lora_B.norm(dim=0) == 0)
            assert not dead.any()


def check_sums(strategy: HeterogeneousLora, clients: list[Client]) -> None:
    """Hold a fold to what ``sums_updates`` says: of the updates it needs their sums alone."""
    updates = [update_of(strategy, client, noise) for client in clients]
    of_single = merge(copy.deepcopy(strategy), updates)
    of_means = merge(copy.deepcopy(strategy), means_over_trainers(strategy, updates))
    assert_same_products(of_means, of_single)


class TestSums:
    @pytest.mark.parametrize("aggregation", ["adaptive", "zero_padding", "change"])
    @pytest.mark.parametrize("choice", ["selection=prefix", "importance=magnitude"])
    def test_hafl_needs_sums_alone_where_it_takes_no_scores_of_uploads(self, aggregation, choice):
        plain = (f"strategy.{choice}", f"strategy.aggregation={aggregation}")
        strategy = strategy_named("hafl", *plain)
        assert strategy.traits.sums_updates
        check_sums(strategy, clients_for("hafl"))
        assert not strategy_named("hafl", "strategy.importance=contribution").traits.sums_updates

    @pytest.mark.parametrize("weight", ["per_component", "examples"])
    @pytest.mark.parametrize("selection", ["random", "prefix"])
    def test_hafl_plus_needs_sums_alone_where_it_scores_no_client(self, selection, weight):
        chosen = (f"strategy.selection={selection}", f"strategy.client_weight={weight}")
        strategy = strategy_named("hafl_plus", *chosen)
        assert strategy.traits.sums_updates
        check_sums(strategy, clients_for("hafl_plus"))
        assert not strategy_named("hafl_plus").traits.sums_updates

    def test_hafl_needs_sums_of_what_clients_chose_only_where_all_are_the_divisor(self):
        by_client = ("strategy.selection_by=client", "strategy.aggregation=change")
        strategy = strategy_named("hafl", *by_client, "strategy.coverage_exponent=1")
        assert strategy.traits.sums_updates
        check_sums(strategy, clients_for("hafl"))
        for other in ("strategy.aggregation=adaptive", "strategy.coverage_exponent=0.5"):
            strategy = strategy_named("hafl", *by_client, other)
            assert not strategy.traits.sums_updates
            with pytest.raises(AssertionError):
                check_sums(strategy, clients_for("hafl"))

    @pytest.mark.parametrize("name", ["hetlora", "flexlora", "flora", "fedex_lora"])
    def test_the_law_fails_for_what_needs_single_updates(self, name):
        assert not strategy_named(name).traits.sums_updates
        with pytest.raises(AssertionError):
            check_sums(strategy_named(name), clients_for(name))


class TestPlans:
    def test_dispatch_returns_what_the_plan_holds(self, name):
        strategy = strategy_named(name)
        for client in clients_for(name):
            plan = strategy.plan(client.profile, 1)
            sent = strategy.dispatch(plan)
            assert set(sent.modules) == set(strategy.global_adapter.modules) == set(plan.modules)
            for module, factors in sent.modules.items():
                assert factors.rank == len(plan.modules[module].held)
                whole = strategy.global_adapter.modules[module]
                held = whole.lora_B[:, list(plan.modules[module].held)]
                if plan.density < 1:  # the largest numbers, all others 0
                    held = held.where(factors.lora_B != 0, 0.0)
                if plan.modules[module].core is not None:
                    again = with_cores(
                        factors, strategy.bases()[module].select(range(factors.rank))
                    )
                    torch.testing.assert_close(again.lora_B, held)
                    continue
                own = plan.modules[module].own_lora_B
                assert torch.equal(factors.lora_B, held[:0] if own else held)

    def test_no_client_trains_more_than_its_budget(self, name):
        strategy = strategy_named(name)
        for client in clients_for(name):
            plan = strategy.plan(client.profile, 1)
            # Of twice as many components one factor alone is as much.
            trained = sum(
                m.num_trained / (1 if m.factors == "both" else 2) for m in plan.modules.values()
            )
            trained *= plan.density  # where all are trained, and the largest numbers count
            assert trained <= client.rank * len(plan.modules)
            assert trained > 0

    def test_plans_follow_from_seed_round_and_client_alone(self, name):
        for client in clients_for(name):
            first, second = (strategy_named(name).plan(client.profile, 2) for _ in range(2))
            assert first == second

    def test_a_plan_survives_the_wire(self, name):
        for client in clients_for(name):
            plan = strategy_named(name).plan(client.profile, 1)
            assert TrainPlan.from_json(plan.to_json()) == plan
