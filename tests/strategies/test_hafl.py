"""Promises of HAFL alone: the components that a client trains, and the update of the scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from driving import MAX_RANK, Client, merge, noise, nothing, run_options, strategy_named, update_of

from hafl_app.seeds import client_seed
from hafl_app.server.compatibility import private_division
from hafl_app.server.method import StrategyError

RANK, ALPHA = 2, 16.0


def hafl(*overrides):
    return strategy_named("hafl", *(f"strategy.{o}" for o in overrides))


def advance(strategy, updates):
    strategy.global_adapter = replace(strategy.global_adapter, modules=merge(strategy, updates))


def with_scores(update, scores):
    """An update whose trained components have these scores."""
    measured = {
        n: torch.tensor(scores[n])[list(update.components(n))] for n in update.adapter.modules
    }
    return replace(update, importance=measured)


class TestSchemes:
    def test_freezing_holds_everything_and_trains_the_budget(self):
        plan = hafl("scheme=freezing").plan(Client(RANK, 10, 0).profile, 1)
        for module in plan.modules.values():
            assert module.held == tuple(range(MAX_RANK))
            assert len(module.trainable) == RANK
            assert set(module.frozen_slots) == set(range(MAX_RANK)) - set(module.trainable)

    def test_truncation_holds_only_what_it_trains(self):
        plan = hafl("scheme=truncation").plan(Client(RANK, 10, 0).profile, 1)
        assert all(m.held == m.trainable and len(m.held) == RANK for m in plan.modules.values())

    @pytest.mark.parametrize("scheme", ["freezing", "truncation"])
    def test_one_scaling_for_all_ranks(self, scheme):
        strategy = hafl(f"scheme={scheme}")
        strategy.options = run_options(strategy.options, lora_alpha=ALPHA, scaling="per_rank")
        plans = [strategy.plan(Client(rank, 10, rank).profile, 1) for rank in (1, 2, MAX_RANK)]
        scalings = {m.scaling for plan in plans for m in plan.modules.values()}
        # The same component must mean the same on every client, also where it is one of two.
        assert scalings == {ALPHA / MAX_RANK}

    def test_prefix_and_random_are_controls_without_scores(self):
        prefix = hafl("selection=prefix").plan(Client(RANK, 10, 0).profile, 1)
        assert {m.trainable for m in prefix.modules.values()} == {(0, 1)}
        random = hafl("selection=random")
        chosen = {
            random.plan(Client(RANK, 10, p).profile, r).modules["dense"].trainable
            for p in range(6)
            for r in (1, 2)
        }
        assert len(chosen) > 3
        assert prefix.importance == random.plan(Client(RANK, 10, 0).profile, 1).importance == "none"

    def test_the_whole_model_shares_one_budget(self):
        strategy = hafl("scope=model", "exploration=0")
        strategy.scores.values = {
            "query": torch.full((MAX_RANK,), 9.0),
            "dense": torch.full((MAX_RANK,), 1.0),
        }
        plan = strategy.plan(Client(RANK, 10, 0).profile, 2)
        assert len(plan.modules["query"].trainable) == MAX_RANK  # 2 a module, all spent on one
        assert plan.modules["dense"].trainable == ()


class TestSelection:
    def test_round_one_is_all_ties_and_broken_at_random(self):
        strategy = hafl()
        chosen = {
            strategy.plan(Client(RANK, 10, p).profile, 1).modules["dense"].trainable
            for p in range(12)
        }
        assert len(chosen) > 3  # of 6 pairs; the prefix alone would starve the others

    def test_the_most_important_are_chosen(self):
        strategy = hafl("exploration=0")
        strategy.scores.values = {n: torch.tensor([0.1, 3.0, 0.2, 2.0]) for n in ("query", "dense")}
        for partition in range(5):
            plan = strategy.plan(Client(RANK, 10, partition).profile, 4)
            assert plan.modules["dense"].trainable == (1, 3)

    def test_exploration_brings_frozen_components_back(self):
        scores = {n: torch.tensor([0.1, 3.0, 0.2, 2.0]) for n in ("query", "dense")}
        seen = {}
        for share in (0.0, 0.5):
            strategy = hafl(f"exploration={share}")
            strategy.scores.values = scores
            plans = [strategy.plan(Client(RANK, 10, p).profile, 4) for p in range(40)]
            seen[share] = {c for plan in plans for c in plan.modules["dense"].trainable}
        assert seen[0.0] == {1, 3}
        assert seen[0.5] == {0, 1, 2, 3}

    def test_unmeasured_components_get_a_turn(self):
        strategy = hafl("exploration=0")
        unmeasured = float("nan")
        strategy.scores.values = {
            n: torch.tensor([5.0, 1.0, unmeasured, 1.0]) for n in ("query", "dense")
        }
        plan = strategy.plan(Client(RANK, 10, 0).profile, 4)
        assert plan.modules["dense"].trainable == (0, 2)

    def test_the_seed_decides(self):
        plans = {}
        for seed in (0, 1, 2, 3):
            strategy = hafl()
            strategy.options = run_options(strategy.options, seed=seed)
            plans[seed] = strategy.plan(Client(RANK, 10, 0).profile, 1)
        assert len({plan.to_json() for plan in plans.values()}) > 1
        assert client_seed(0, 1, 0) != client_seed(1, 1, 0)


class TestScores:
    def test_smoothing_over_rounds_against_a_written_out_recursion(self):
        strategy = hafl("smoothing=0.75", "exploration=0", "selection=importance")
        clients = [Client(MAX_RANK, 10, 0), Client(MAX_RANK, 30, 1)]
        rounds = [
            ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]),
            ([2.0, 2.0, 2.0, 2.0], [0.0, 4.0, 0.0, 4.0]),
        ]
        expected = None
        for server_round, (first, second) in enumerate(rounds, 1):
            advance(
                strategy,
                [
                    with_scores(
                        update_of(strategy, c, noise, server_round),
                        dict.fromkeys(("query", "dense"), s),
                    )
                    for c, s in zip(clients, (first, second), strict=True)
                ],
            )
            # Weighted by num_examples 10 and 30; the first measurement starts the average.
            mean = [0.25 * a + 0.75 * b for a, b in zip(first, second, strict=True)]
            expected = (
                mean
                if expected is None
                else [0.75 * e + 0.25 * m for e, m in zip(expected, mean, strict=True)]
            )

        torch.testing.assert_close(strategy.scores.values["dense"], torch.tensor(expected).double())

    def test_scores_of_frozen_components_stay(self):
        strategy = hafl("exploration=0")
        start = torch.tensor([5.0, 4.0, 0.3, 0.2]).double()
        strategy.scores.values = {n: start.clone() for n in ("query", "dense")}
        for server_round in (2, 3, 4):
            update = update_of(strategy, Client(RANK, 10, 0), noise, server_round)
            advance(strategy, [with_scores(update, dict.fromkeys(("query", "dense"), [1.0] * 4))])
        assert torch.equal(strategy.scores.values["dense"][2:], start[2:])
        assert (strategy.scores.values["dense"][:2] < start[:2]).all()

    def test_the_servers_measure_is_of_the_rounds_learning_rate(self):
        scores = []
        for share in (1.0, 0.25):
            strategy = hafl("source=server", "importance=smoothed", "selection=importance")
            update = update_of(strategy, Client(RANK, 10, 0), noise)
            update = replace(update, plan=replace(update.plan, rates=(share,)))
            advance(strategy, [update])
            scores.append(strategy.scores.values["dense"].nan_to_num())
        torch.testing.assert_close(scores[1], 4 * scores[0])

    @pytest.mark.parametrize("importance", ["smoothed", "adalora", "sensitivity"])
    def test_the_server_can_measure_from_the_change(self, importance):
        strategy = hafl("source=server", f"importance={importance}", "selection=importance")
        plan = strategy.plan(Client(RANK, 10, 0).profile, 1)
        assert plan.importance == "none"  # no client uploads anything for it
        update = update_of(strategy, Client(RANK, 10, 0), noise)
        before, components = strategy.global_adapter.modules["dense"], update.components("dense")
        advance(strategy, [update])
        scores = strategy.scores.values["dense"]
        assert scores[list(components)].gt(0).all()
        untouched = [i for i in range(MAX_RANK) if i not in components]
        assert scores[untouched].isnan().all()
        if importance == "sensitivity":
            # |w (w - w') / eta| with the scaling taken out of lora_B, averaged over each vector.
            after = strategy.global_adapter.modules["dense"]
            eta, scale = strategy.learning_rate, strategy.scaling_of(MAX_RANK)
            b, b2 = before.lora_B.double() / scale, after.lora_B.double() / scale
            a, a2 = before.lora_A.double(), after.lora_A.double()
            by_hand = (b * (b - b2)).abs().mean(0) / eta + (a * (a - a2)).abs().mean(1) / eta
            torch.testing.assert_close(
                scores[list(components)], by_hand[list(components)], rtol=1e-5, atol=0
            )

    def test_contribution_and_magnitude_need_no_upload(self):
        for importance in ("contribution", "magnitude"):
            strategy = hafl(f"importance={importance}", "exploration=0")
            assert strategy.plan(Client(RANK, 10, 0).profile, 1).importance == "none"
        strategy = hafl("importance=magnitude", "exploration=0")
        factors = strategy.global_adapter.modules["dense"]
        norms = factors.lora_B.norm(dim=0) * factors.lora_A.norm(dim=1)
        chosen = strategy.plan(Client(RANK, 10, 0).profile, 3).modules["dense"].trainable
        assert set(chosen) == set(norms.topk(RANK).indices.tolist())

    def test_a_probe_scores_everything_held(self):
        strategy = hafl("probe_batches=2")
        update = update_of(strategy, Client(RANK, 10, 0), noise)
        assert update.plan.probe_batches == 2
        scores = {n: torch.tensor([1.0, 2.0, 3.0, 4.0]) for n in update.adapter.modules}
        advance(strategy, [replace(update, importance=scores)])
        assert strategy.scores.values["dense"].tolist() == [1.0, 2.0, 3.0, 4.0]


class TestAggregation:
    def updates(self, strategy):
        return [
            update_of(strategy, Client(r, n, p), noise)
            for p, (r, n) in enumerate([(1, 10), (2, 30), (2, 5)])
        ]

    def test_adaptive_averages_over_those_who_trained(self):
        strategy = hafl("aggregation=adaptive")
        updates = self.updates(strategy)
        merged = merge(strategy, updates)
        for name, before in strategy.global_adapter.modules.items():
            for component in range(MAX_RANK):
                rows = [
                    (
                        u.num_examples,
                        u.adapter.modules[name].lora_A[u.components(name).index(component)],
                    )
                    for u in updates
                    if component in u.components(name)
                ]
                if not rows:
                    assert torch.equal(merged[name].lora_A[component], before.lora_A[component])
                    assert torch.equal(
                        merged[name].lora_B[:, component], before.lora_B[:, component]
                    )
                    continue
                mean = sum(n * row for n, row in rows) / sum(n for n, _ in rows)
                torch.testing.assert_close(merged[name].lora_A[component], mean)

    def test_zero_padding_dilutes_what_few_trained(self):
        adaptive, padded = (hafl(f"aggregation={a}") for a in ("adaptive", "zero_padding"))
        clients = [Client(1, 10, 0), Client(2, 30, 1), Client(4, 5, 2)]
        kept, shrunk = (
            merge(s, [update_of(s, c, nothing) for c in clients]) for s in (adaptive, padded)
        )
        before = adaptive.global_adapter.modules
        for name in before:
            torch.testing.assert_close(kept[name].delta_weight(), before[name].delta_weight())
            assert shrunk[name].delta_weight().norm() < 0.9 * before[name].delta_weight().norm()


class TestAggregationOfChanges:
    """The oracle is the equation alone, in numpy; ranks, and so coverage, and examples differ."""

    def updates(self, strategy):
        clients = [(1, 10), (2, 30), (4, 5), (2, 12)]
        return [update_of(strategy, Client(r, n, p), noise) for p, (r, n) in enumerate(clients)]

    @pytest.mark.parametrize("scheme", ["freezing", "truncation"])
    @pytest.mark.parametrize(("exponent", "step"), [(0.0, 1.0), (0.5, 1.0), (1.0, 3.0)])
    def test_is_the_equation(self, scheme, exponent, step):
        settings = (f"coverage_exponent={exponent}", f"server_step={step}")
        strategy = hafl("aggregation=change", f"scheme={scheme}", *settings)
        updates = self.updates(strategy)
        start = {n: f.lora_B.double().numpy() for n, f in strategy.global_adapter.modules.items()}

        merged = merge(strategy, updates)

        everybody = sum(u.num_examples for u in updates)
        for name, before in start.items():
            expected = before.copy()
            for i in range(MAX_RANK):
                trained = [u for u in updates if i in u.plan.modules[name].trainable]
                examples = sum(u.num_examples for u in trained)
                for u in trained:
                    plan = u.plan.modules[name]
                    after = u.adapter.modules[name].lora_B[:, plan.trainable.index(i)].numpy()
                    sent = u.sent.modules[name].lora_B[:, plan.held.index(i)].numpy()
                    share = u.num_examples / (examples ** (1 - exponent) * everybody**exponent)
                    expected[:, i] += step * share * (after - sent)
            np.testing.assert_allclose(merged[name].lora_B.numpy(), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("scheme", ["freezing", "truncation"])
    def test_with_exponent_0_is_the_papers_rule_bit_for_bit(self, scheme):
        ours = hafl("aggregation=change", "coverage_exponent=0", f"scheme={scheme}")
        paper = hafl("aggregation=adaptive", f"scheme={scheme}")
        got, expected = (merge(s, self.updates(s)) for s in (ours, paper))
        mean = merge(s := hafl("aggregation=change", f"scheme={scheme}"), self.updates(s))
        for name, factors in expected.items():
            assert torch.equal(got[name].lora_A, factors.lora_A)
            assert torch.equal(got[name].lora_B, factors.lora_B)
            assert not torch.allclose(mean[name].lora_B, factors.lora_B, rtol=1e-2)

    def test_few_clients_do_not_decide_what_they_alone_train(self):
        """Of two components one has two clients of 5 of 100 examples; it moves by 5 % of theirs."""
        strategy = hafl("aggregation=change", "selection=prefix")
        clients = [Client(1, 95, 0), Client(2, 5, 1)]
        updates = [update_of(strategy, client, noise) for client in clients]
        before = strategy.global_adapter.modules["dense"].lora_B
        change = merge(strategy, updates)["dense"].lora_B - before
        own = updates[1].adapter.modules["dense"].lora_B[:, 1] - before[:, 1]
        torch.testing.assert_close(change[:, 1], 0.05 * own, rtol=1e-4, atol=1e-6)

    def test_is_refused_where_it_has_no_meaning(self):
        strategy = hafl("aggregation=change", "selection=prefix")
        strategy.options = run_options(strategy.options, robust="median")
        with pytest.raises(StrategyError, match="aggregation=change weighs a component by all"):
            strategy.check([1, 2])
        with pytest.raises(StrategyError, match="no denominators for aggregation=change"):
            private_division(strategy)


class TestScoresUnderARobustRule:
    """A Byzantine client scores one component a million times as high as all others."""

    CLIENTS = tuple(Client(MAX_RANK, n, k) for k, n in enumerate((10, 25, 7, 31, 12)))
    HONEST = torch.tensor([4.0, 3.0, 2.0, 1.0])

    def after_a_lie(self, rule):
        strategy = hafl("importance=sensitivity", "exploration=0")
        strategy.options = run_options(strategy.options, robust=rule)
        updates = []
        for client in self.CLIENTS:
            lie = torch.tensor([1.0, 1.0, 1.0, 1e6]) if client.partition_id == 3 else 1.0
            scores = (1 + 0.1 * client.partition_id) * self.HONEST * lie
            update = update_of(strategy, client, noise)
            told = {"query": scores.tolist(), "dense": scores.flip(0).tolist()}
            updates.append(with_scores(update, told))
        merge(strategy, updates)
        return strategy

    @pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
    def test_it_steers_no_plan(self, rule):
        strategy = self.after_a_lie(rule)

        plan = strategy.plan(Client(RANK, 10, 0).profile, 2)

        assert {n: set(m.trainable) for n, m in plan.modules.items()} == {
            "query": {0, 1},
            "dense": {2, 3},
        }

    def test_the_score_is_the_clients_median(self):
        # They say 1.0, 1.1, 1.2, 1.4 and either 1.3 or, of one component, 1.3 million times HONEST.
        scores = self.after_a_lie("median").scores.values
        torch.testing.assert_close(scores["query"], 1.2 * self.HONEST.double())

    def test_without_a_rule_it_steers_all_plans(self):
        plan = self.after_a_lie("none").plan(Client(RANK, 10, 0).profile, 2)
        assert 3 in plan.modules["query"].trainable
        assert 0 in plan.modules["dense"].trainable
