"""HAFL+: what each ingredient does, that its switch turns it off, and what it remembers."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from driving import MAX_RANK, Client, advance, merge, noise, run_options, strategy_named, update_of

from hafl_app.config.compose import compose
from hafl_app.lowrank.factors import LoraFactors
from hafl_app.plan_parts.alignment import Alignment
from hafl_app.run import build
from hafl_app.server.compatibility import private_division
from hafl_app.server.method import StrategyError
from hafl_app.strategies.hafl_plus import Candidate, balanced
from hafl_app.wire.node_profile import NodeProfile

CLIENTS = [Client(1, 40, 0), Client(2, 30, 1), Client(4, 5, 2), Client(1, 12, 3)]
OFF = ("coverage_exponent=0", "client_weight=examples", "factors=both", "selection=random")


def plus(*overrides):
    return strategy_named("hafl_plus", *(f"strategy.{o}" for o in overrides))


def with_nodes(strategy, profiles):
    """The strategy of a run in which these nodes have answered."""
    strategy.coordinator.participation.trainable = lambda: list(profiles)
    return strategy


class TestTheStep:
    @pytest.mark.parametrize("weight", ["per_component", "examples"])
    @pytest.mark.parametrize(("exponent", "step"), [(1.0, 1.0), (0.5, 1.0), (0.0, 2.0)])
    def test_is_the_equation(self, exponent, step, weight):
        switches = (f"coverage_exponent={exponent}", f"server_step={step}")
        strategy = plus(*switches, f"client_weight={weight}")
        updates = [update_of(strategy, client, noise) for client in CLIENTS]
        start = strategy.global_adapter.modules
        before = {n: f.lora_B.double().numpy() for n, f in start.items()}

        merged = merge(strategy, updates)

        counts = [sum(len(m.trainable) for m in u.plan.modules.values()) for u in updates]
        assert len(set(counts)) > 1
        own = counts if weight == "per_component" else [1] * len(updates)
        v = [u.num_examples / count for u, count in zip(updates, own, strict=True)]
        for name, b in before.items():
            expected = b.copy()
            for i in range(MAX_RANK):
                trained = [k for k, u in enumerate(updates) if i in u.components(name)]
                v_i = sum(v[k] for k in trained)
                for k in trained:
                    slot = updates[k].components(name).index(i)
                    change = updates[k].adapter.modules[name].lora_B[:, slot].numpy() - b[:, i]
                    expected[:, i] += (
                        step * v[k] * change / (v_i ** (1 - exponent) * sum(v) ** exponent)
                    )
            np.testing.assert_allclose(merged[name].lora_B.numpy(), expected, rtol=1e-5, atol=1e-6)

    def test_with_all_switches_off_it_is_hafl_bit_for_bit(self):
        ours = plus(*OFF)
        hafl = strategy_named("hafl", "strategy.selection=random", "strategy.exploration=0")
        plans = [[s.plan(c.profile, 3) for c in CLIENTS] for s in (ours, hafl)]
        assert [p.modules for p in plans[0]] == [p.modules for p in plans[1]]
        merged = [merge(s, [update_of(s, c, noise, 3) for c in CLIENTS]) for s in (ours, hafl)]
        for name, factors in merged[1].items():
            assert torch.equal(merged[0][name].lora_A, factors.lora_A)
            assert torch.equal(merged[0][name].lora_B, factors.lora_B)

    def test_a_clients_part_is_its_share_of_the_examples_whatever_its_rank(self):
        """All move every number of lora_B alike: the sums of the step are the clients' parts."""
        strategy = plus()

        def moved(clients):
            def change(factors, generator):
                return LoraFactors(factors.lora_A, factors.lora_B + 1)

            still = [update_of(strategy, c, lambda f, _: f) for c in CLIENTS]
            moving = [
                update_of(strategy, c, change) if c in clients else s
                for c, s in zip(CLIENTS, still, strict=True)
            ]
            end = merge(strategy, moving)
            start = strategy.global_adapter.modules
            # Of both modules, per row: query has 7 rows, dense 6.
            return sum(float((end[n].lora_B - start[n].lora_B)[0].sum()) for n in start)

        whole = moved(CLIENTS)
        for client in CLIENTS:
            assert moved([client]) / whole == pytest.approx(client.num_examples / 87, rel=1e-4)


class TestPlans:
    def test_odd_rounds_train_lora_B_of_twice_the_components(self):
        strategy = plus()
        for server_round, factors in ((1, "B"), (2, "A"), (3, "B")):
            for client in CLIENTS:
                for module in strategy.plan(client.profile, server_round).modules.values():
                    assert module.factors == factors
                    assert len(module.trainable) == min(2 * client.rank, MAX_RANK)
                    assert module.held == tuple(range(MAX_RANK))
        both = plus("factors=both").plan(CLIENTS[1].profile, 1)
        assert {(m.factors, len(m.trainable)) for m in both.modules.values()} == {("both", 2)}

    def test_without_fold_a_client_holds_what_it_trains(self):
        plan = plus("fold=false").plan(CLIENTS[0].profile, 1)
        assert all(m.held == m.trainable for m in plan.modules.values())

    def test_the_ratio_of_the_rates_is_five_unless_told(self):
        assert compose(["strategy=hafl_plus"]).client.lora_B_lr_ratio == 5
        told = compose(["strategy=hafl_plus", "client.lora_B_lr_ratio=2"])
        assert told.client.lora_B_lr_ratio == 2

    def test_the_server_s_momentum_has_the_components_it_needs(self):
        strategy = plus()
        strategy.options = run_options(strategy.options)
        assert strategy.traits.keeps_components

    def test_rotation_goes_with_the_first_components_alone(self):
        off = ("selection=prefix", "fold=false", "factors=both", "rotation_weight=0.4")
        strategy = plus(*off)
        strategy.check([1, 2])
        plans = [strategy.plan(CLIENTS[1].profile, t) for t in (1, 2, 3)]
        assert [plan.align for plan in plans] == [None, Alignment("A", 0.4), Alignment("B", 0.4)]
        for left_out in range(3):
            kept = [o for i, o in enumerate(off) if i != left_out]
            with pytest.raises(StrategyError, match=r"rotation_weight=0\.4 mixes components"):
                plus(*kept).check([1, 2])

    def test_what_has_no_meaning_is_refused(self):
        strategy = plus()
        strategy.options = run_options(strategy.options, robust="median")
        with pytest.raises(StrategyError, match="weighs a component by all participants"):
            strategy.check([1, 2])
        with pytest.raises(StrategyError, match="assigned by uploads without noise"):
            private_division(plus())


def candidates(budgets, examples, scores=None, rank=8):
    return [
        Candidate(
            NodeProfile(k, 99, 1, n, "cpu"),
            {"m": budget},
            {"m": torch.zeros(rank) if scores is None else scores[k]},
            random.Random(k),
        )
        for k, (budget, n) in enumerate(zip(budgets, examples, strict=True))
    ]


class TestBalancedCoverage:
    def loads(self, clients, rank=8):
        loads = Counter(dict.fromkeys(range(rank), 0))
        for client, own in zip(clients, balanced(clients, "m", rank), strict=True):
            assert len(own) == len(set(own)) == client.budgets["m"]
            for i in own:
                loads[i] += client.profile.num_examples
        return [loads[i] for i in range(rank)]

    def test_every_component_has_about_the_same_examples(self):
        examples = sorted([7 * k % 40 + 5 for k in range(24)], reverse=True)
        clients = candidates([1 + k % 3 for k in range(24)], examples)
        loads = self.loads(clients)
        mean = sum(loads) / len(loads)
        assert max(abs(load - mean) for load in loads) <= 0.1 * mean
        # One ranking for all, as HAFL's server has it, would put all on the first few.
        ranked = [
            sum(c.profile.num_examples for c in clients if i < c.budgets["m"]) for i in range(8)
        ]
        assert max(abs(load - mean) for load in ranked) > mean

    def test_clients_get_what_they_contribute_most_to_where_there_is_room(self):
        scores = torch.eye(4)[[2, 0, 3, 1]]
        clients = candidates([1] * 4, [10] * 4, scores, rank=4)
        assert balanced(clients, "m", 4) == [(2,), (0,), (3,), (1,)]
        same = torch.tensor([[0.1, 0.2, 0.9, 0.3]] * 4)  # all want the same one; one gets it
        crowded = balanced(candidates([1] * 4, [10] * 4, same, rank=4), "m", 4)
        assert crowded[0] == (2,)
        assert sorted(crowded) == [(0,), (1,), (2,), (3,)]

    def test_holds_for_the_plans_of_a_run(self):
        profiles = [Client(1 + k % 2, 10 + 3 * k, k).profile for k in range(16)]
        loads = {}
        for selection in ("balanced", "prefix"):
            strategy = with_nodes(plus(f"selection={selection}"), profiles)
            plans = [strategy.plan(profile, 2) for profile in profiles]
            examples = Counter()
            for profile, plan in zip(profiles, plans, strict=True):
                examples.update(
                    dict.fromkeys(plan.modules["dense"].trainable, profile.num_examples)
                )
            loads[selection] = max(examples.values()) / min(examples[i] or 1 for i in range(4))
        assert loads["balanced"] < 1.3
        assert loads["prefix"] > 1.7

    def test_one_more_node_or_a_smaller_budget_is_taken_in(self):
        profiles = [Client(2, 10 + k, k).profile for k in range(4)]
        strategy = with_nodes(plus("factors=both"), profiles)
        strategy.plan(profiles[0], 1)
        late = Client(2, 9, 7).profile
        assert len(strategy.plan(late, 1).modules["dense"].trainable) == 2
        strategy.coordinator.participation.rank_limits = {1: 1}  # it ran out of memory
        assert len(strategy.plan(profiles[1], 1).modules["dense"].trainable) == 1


class TestContributions:
    def only(self, component):
        """A training that moves one of the components alone, whatever else it trains."""

        def change(factors, generator):
            lora_B = factors.lora_B.clone()
            lora_B[:, component] += 1
            return LoraFactors(factors.lora_A, lora_B)

        return change

    def test_a_client_comes_back_to_what_it_moved(self):
        strategy, client = plus("factors=both", "selection=contribution"), Client(MAX_RANK, 10, 0)
        advance(strategy, [update_of(strategy, client, self.only(2))])
        plan = strategy.plan(Client(1, 10, 0).profile, 2)
        assert plan.modules["dense"].trainable == (2,)
        # Another client has scores of its own: none, so that chance decides.
        others = {
            strategy.plan(Client(1, 9, k).profile, 2).modules["dense"].trainable
            for k in range(1, 20)
        }
        assert len(others) > 1

    def test_are_unknown_to_a_random_choice(self):
        strategy, client = plus("factors=both", "selection=random"), Client(MAX_RANK, 10, 0)
        one, fresh = Client(1, 10, 0).profile, plus("factors=both", "selection=random")
        advance(strategy, [update_of(strategy, client, self.only(2))])
        plans = [[s.plan(one, t).modules for t in range(2, 8)] for s in (strategy, fresh)]
        assert plans[0] == plans[1]

    def test_are_relative_and_smoothed(self):
        strategy, client = plus("factors=both", "smoothing=0.25"), Client(MAX_RANK, 10, 0)
        advance(strategy, [update_of(strategy, client, self.only(2))])
        assert strategy.contributions[0]["dense"].tolist() == pytest.approx([0, 0, 4, 0])
        advance(strategy, [update_of(strategy, client, self.only(1), 2)])
        assert strategy.contributions[0]["dense"].tolist() == pytest.approx([0, 3, 1, 0])

    def test_what_was_not_trained_has_its_turn(self):
        strategy, client = plus("factors=both", "selection=contribution"), Client(2, 10, 0)
        first = strategy.plan(client.profile, 1).modules["dense"].trainable
        advance(strategy, [update_of(strategy, client, self.only(0))])
        second = strategy.plan(client.profile, 2).modules["dense"].trainable
        # The one that moved, at least as good as one that nobody knows.
        assert len(set(second) - set(first)) >= 1

    def test_are_remembered_and_forgotten(self):
        strategy, client = plus("selection=contribution"), Client(1, 10, 0)
        empty = strategy.memory()
        advance(strategy, [update_of(strategy, client, noise)])
        memory, plan = strategy.memory(), strategy.plan(client.profile, 3)
        advance(strategy, [update_of(strategy, client, noise, 2)])
        again = plus("selection=contribution")
        again.recall(memory)
        assert again.plan(client.profile, 3) == plan
        again.recall(empty)
        assert again.contributions == {}


def test_it_is_built_from_its_file():
    settings = compose(["strategy=hafl_plus", "strategy.fold=false"])
    strategy = build.strategy(settings)
    assert replace(strategy).fold is False


@pytest.mark.parametrize(
    ("selection", "reason", "instead"),
    [
        ("balanced", "assigned by uploads without noise", "random"),
        ("random", "no denominators for a mean of changes", "random"),
        ("prefix", "no denominators for a mean of changes", "prefix"),
    ],
)
def test_why_central_privacy_does_not_cover_it_depends_on_the_selection(selection, reason, instead):
    refused = plus(f"selection={selection}").traits.dp_refusal
    assert reason in refused
    assert refused.endswith(f"use strategy=hafl strategy.selection={instead}")
