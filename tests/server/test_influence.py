"""Influence: the equation, the same for every method's own step, what is kept, and who is told."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from driving import (
    MAX_RANK,
    STRATEGIES,
    Client,
    clients_for,
    dense,
    merge,
    noise,
    nothing,
    run_options,
    strategy_named,
    update_of,
)

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.influence import change_factors, influences
from hafl_app.privacy.mechanism import PrivacyOptions
from hafl_app.server.influence import Influence, InfluenceMeter, deciding

OUT, IN = 7, 5


def factors(rank, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = (rank, IN), (OUT, rank)
    return LoraFactors(*(torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes))


def by_equation(changes):
    """<c_k, D> / ||D||^2 of dense changes."""
    total = sum(changes)
    return [float((change * total).sum() / (total**2).sum()) for change in changes]


class TestAlgebra:
    def test_a_change_is_that_of_the_product(self):
        before, after = factors(3, 1), factors(3, 2)
        torch.testing.assert_close(
            change_factors(before, after).delta_weight(),
            after.delta_weight() - before.delta_weight(),
        )

    @pytest.mark.parametrize("ranks", [(1, 4, 2), (30, 20, 9)])  # with and without the product
    def test_is_the_equation_over_all_modules(self, ranks):
        modules = [[factors(r, 10 * m + r) for r in ranks] for m in range(2)]
        expected = by_equation(
            [np.concatenate([dense(module[k]).ravel() for module in modules]) for k in range(3)]
        )
        got = influences(modules)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9)
        assert got.sum().item() == pytest.approx(1)

    def test_without_clients(self):
        assert influences([]).tolist() == []


def measured(strategy, updates, **options):
    meter = InfluenceMeter(strategy.traits.coverage_exponent, **options)
    for update in updates:
        meter.note(update, strategy.weight(update))
    return meter.result()


def small(factors, generator):
    """A change in which no product of two changes counts, and one direction that all share."""
    moved = noise(factors, generator)
    return LoraFactors(
        factors.lora_A + 1e-3 * (moved.lora_A - factors.lora_A + 0.2),
        factors.lora_B + 1e-3 * (moved.lora_B - factors.lora_B + 0.2),
    )


# A client of flasc holds the largest numbers alone; florist cuts the stack a little; a change
# moves the norm that is a weight of hetlora.
ROUGH = {"flasc": 0.05, "florist": 0.03, "hetlora": 0.01}
HAFL = [
    ("hafl", f"strategy.aggregation={aggregation}", f"strategy.coverage_exponent={exponent}")
    for aggregation, exponent in (("zero_padding", 1), ("change", 0.5), ("change", 1))
]


@pytest.mark.parametrize("named", [(name,) for name in STRATEGIES] + HAFL)
def test_is_that_of_the_methods_own_step(named):
    """A client's part of the step is what the step lacks without its change."""
    strategy = strategy_named(*named)
    if strategy.traits.coverage_exponent is None:
        pytest.skip("its step is no mean of the clients' changes")
    if named[0] == "hetlora":  # a norm for all modules, where the method has one for each
        strategy.norm_scope = "client"
    clients = clients_for(named[0])
    updates = [update_of(strategy, client, small) for client in clients]
    still = [replace(update, adapter=update.before) for update in updates]

    def step(of):
        # The part of the step beyond what happens if nobody changes anything.
        ends = [merge(copy.deepcopy(strategy), each) for each in (of, still)]
        return np.concatenate([(dense(a) - dense(ends[1][n])).ravel() for n, a in ends[0].items()])

    parts = [step([u if i == k else s for i, s in enumerate(still)]) for k, u in enumerate(updates)]

    got = measured(strategy, updates)

    is_cut = strategy.traits.homogeneous_form == "product mean"  # to max_rank, from each a part
    atol = 0.1 if is_cut else ROUGH.get(named[0], 0.002)
    assert [one.partition_id for one in got] == [client.partition_id for client in clients]
    np.testing.assert_allclose([one.share for one in got], by_equation(parts), atol=atol)


class TestAdaptiveAggregation:
    """Client 1 alone trains component 1; 4 equal changes of components that are alike."""

    def updates(self, strategy):
        one = torch.ones(1)
        clients = [Client(1, 90, 0), Client(2, 10, 1)]

        def change(factors, generator):
            return LoraFactors(factors.lora_A, factors.lora_B + one)

        return [update_of(strategy, client, change) for client in clients]

    def shares(self, strategy):
        modules = {
            n: LoraFactors(torch.eye(MAX_RANK, f.in_features), torch.zeros_like(f.lora_B))
            for n, f in strategy.global_adapter.modules.items()
        }
        strategy.global_adapter = replace(strategy.global_adapter, modules=modules)
        return measured(strategy, self.updates(strategy))

    def test_few_examples_decide_what_they_alone_train(self):
        got = self.shares(strategy_named("rbla"))
        # Of the two components' equal steps: 90 % of one; 10 % of it, and all of the other.
        assert [one.share for one in got] == pytest.approx([0.9 / 2, 1.1 / 2])
        assert [one.examples for one in got] == pytest.approx([0.9, 0.1])
        assert [one.components for one in got] == pytest.approx([90 / 110, 20 / 110])

    def test_in_a_mean_of_changes_they_do_not(self):
        change = ("strategy.aggregation=change", "strategy.selection=prefix")
        got = self.shares(strategy_named("hafl", *change))
        # c_0 = (0.9, 0), c_1 = (0.1, 0.1), D = (1, 0.1)
        assert [one.share for one in got] == pytest.approx([0.9 / 1.01, 0.11 / 1.01])


def test_projected_it_is_close_and_small():
    strategy = strategy_named("rbla")
    clients = [Client(1 + k % MAX_RANK, 10 + 7 * k, k) for k in range(12)]
    updates = [update_of(strategy, client, small) for client in clients]
    exact, close = measured(strategy, updates), measured(strategy, updates, projects=True)
    for one, other in zip(exact, close, strict=True):
        assert other.share == pytest.approx(one.share, abs=0.08)
        assert (other.examples, other.components) == (one.examples, one.components)


def test_without_a_change_there_is_none():
    strategy = strategy_named("rbla")
    updates = [update_of(strategy, client, nothing) for client in clients_for("rbla")]
    assert measured(strategy, updates) == ()
    assert measured(strategy, []) == ()


class TestWhoDecides:
    def test_names_few_clients_with_few_examples(self):
        clients = [Influence(k, 0.47 / 28, 0.982 / 28, 0.03) for k in range(28)]
        clients += [Influence(28, 0.3, 0.01, 0.1), Influence(29, 0.23, 0.008, 0.1)]
        assert deciding(clients) == ("2 clients with 1.8% of the examples make up 53% of the step")
        one = [Influence(0, 0.6, 0.1, 0.3), Influence(1, 0.4, 0.9, 0.7)]
        assert deciding(one) == "1 client with 10.0% of the examples makes up 60% of the step"

    def test_is_silent_where_examples_decide(self):
        assert deciding([]) == ""
        assert deciding([Influence(k, 0.1, 0.1, 0.1) for k in range(10)]) == ""
        assert deciding([Influence(0, 0.8, 0.7, 0.7), Influence(1, 0.2, 0.3, 0.3)]) == ""
        assert deciding([Influence(0, 1.0, 1.0, 1.0)]) == ""


class TestWhichRunsHaveIt:
    def meter(self, *overrides, name="rbla", **options):
        strategy = strategy_named(name, *overrides)
        strategy.options = run_options(strategy.options, **options)
        return strategy.coordinator._influence_meter()

    def test_those_whose_updates_may_be_seen(self):
        assert not self.meter()._projects
        assert self.meter(streaming=True)._projects
        assert self.meter(robust="median") is None
        assert self.meter(privacy=PrivacyOptions(kind="central_dp")) is None
        assert self.meter(name="fedsa_lora") is None

    def test_while_streaming_no_update_is_kept(self):
        strategy = strategy_named("rbla")
        update = update_of(strategy, Client(2, 9, 0), noise)
        meter = InfluenceMeter(0.0, projects=True)
        meter.note(update, 9.0)
        (kept,) = meter._clients
        for name, before in update.before.modules.items():
            change = kept.change(name)
            assert change.lora_A.shape == (2 * before.rank, 16)
            assert change.lora_B.shape == (16, 2 * before.rank)
