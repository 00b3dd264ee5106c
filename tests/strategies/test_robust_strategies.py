"""Rounds with wrong clients in them: robust rules, clipping, and refused outliers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from driving import HEAD, MAX_RANK, Client, merge, noise, run_options, strategy_named, update_of
from flwr.app import Array, Message
from running import records, run_tiny, tampering

from hafl_app.lowrank.change import change_size
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.server.aggregation import merge as merge_into
from hafl_app.server.method import StrategyError
from hafl_app.server.outliers import clip_updates

pytestmark = pytest.mark.slow  # whole federations

RULES = ("median", "trimmed_mean")
# Ten clients of mixed ranks: all train component 0, five the last.
RANKS = (4, 2, 4, 2, 4, 1, 4, 2, 4, 3)
EXAMPLES = (10, 25, 7, 31, 12, 40, 9, 18, 22, 5)


def robust(name, rule="median", *overrides):
    strategy = strategy_named(name, *overrides)
    strategy.options = run_options(strategy.options, robust=rule, trim_fraction=0.3)
    return strategy


def updates_of(strategy, ranks=RANKS):
    clients = [Client(r, n, k) for k, (r, n) in enumerate(zip(ranks, EXAMPLES, strict=True))]
    return [update_of(strategy, client, noise) for client in clients]


def scaled(update, factor):
    adapter = update.adapter.map(lambda f: LoraFactors(f.lora_A * factor, f.lora_B * factor))
    return replace(update, adapter=adapter)


def columns_of(updates, module, component):
    """Return each contributor's upload of that column of lora_B."""
    return torch.stack(
        [
            u.adapter.modules[module].lora_B[:, u.components(module).index(component)]
            for u in updates
            if component in u.components(module)
        ]
    )


class TestMethodsThatCan:
    @pytest.mark.parametrize("overrides", [(), ("strategy.scheme=truncation",)])
    def test_hafl_takes_the_median_over_those_who_trained_a_component(self, overrides):
        strategy = robust("hafl", "median", *overrides)
        updates = updates_of(strategy)

        merged = merge(strategy, updates)

        for module, factors in merged.items():
            for component in range(MAX_RANK):
                values = columns_of(updates, module, component).numpy()
                np.testing.assert_allclose(
                    factors.lora_B[:, component].numpy(), np.median(values, axis=0), rtol=1e-6
                )

    def test_fedit_trims_whole_shares(self):
        strategy = robust("fedit", "trimmed_mean")
        updates = updates_of(strategy, ranks=(3,) * 10)

        merged = merge(strategy, updates)

        values = columns_of(updates, "dense", 2).sort(0).values
        # floor(0.3 * 10) = 3 at either end; all count the same.
        expected = values[3:7].mean(0)
        torch.testing.assert_close(merged["dense"].lora_B[:, 2], expected)

    @pytest.mark.parametrize("factor", [1e6, -1.0, -1e6])
    def test_four_wrong_clients_of_ten_stay_in_the_honest_range(self, factor):
        strategy = robust("hafl", "median", "strategy.selection=prefix")
        honest = updates_of(strategy)
        mixed = [scaled(u, factor) if k < 4 else u for k, u in enumerate(honest)]

        merged = merge(strategy, mixed)

        for component in range(MAX_RANK):
            values = columns_of(honest[4:], "query", component)
            got = merged["query"].lora_B[:, component]
            assert ((got >= values.amin(0)) & (got <= values.amax(0))).all()

    def test_without_a_rule_they_do_not(self):
        strategy = robust("hafl", "none", "strategy.selection=prefix")
        mixed = [scaled(u, 1e6) if k < 4 else u for k, u in enumerate(updates_of(strategy))]
        assert merge(strategy, mixed)["query"].lora_B.abs().max() > 1e4

    @pytest.mark.parametrize("rule", RULES)
    def test_components_that_no_client_trained_stay(self, rule):
        strategy = robust("hafl", rule, "strategy.selection=prefix")
        before = strategy.global_adapter.modules["query"].lora_B[:, 2:]

        merged = merge(strategy, updates_of(strategy, ranks=(2, 1) * 5))

        assert torch.equal(merged["query"].lora_B[:, 2:], before)

    @pytest.mark.parametrize("rule", RULES)
    def test_scores_from_the_servers_view_of_the_change_go_on(self, rule):
        strategy = robust("hafl", rule, "strategy.source=server", "strategy.exploration=0")
        merge(strategy, updates_of(strategy))
        assert all(scores.isfinite().any() for scores in strategy.scores.values.values())

    def test_the_head_follows_the_rule(self):
        strategy = robust("hafl")
        updates = [
            replace(u, adapter=u.adapter.with_head({n: torch.full(s, v) for n, s in HEAD.items()}))
            for u, v in zip(updates_of(strategy)[:3], (1.0, 2.0, 1e9), strict=True)
        ]
        head = merge_into(strategy, strategy.global_adapter, updates).head
        assert torch.equal(head["weight"], torch.full(HEAD["weight"], 2.0))


class TestMethodsThatCannot:
    CASES = (
        ("zero_padding", (), "zeros"),
        ("hafl", ("strategy.aggregation=zero_padding",), "zeros"),
        ("hetlora", (), "norm"),
        ("flexlora", (), "products"),
        ("flexlora_change", (), "products"),
    )

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize(("name", "overrides", "reason"), CASES)
    def test_are_refused_by_name_and_reason(self, name, overrides, reason, rule):
        strategy = robust(name, rule, *overrides)
        with pytest.raises(StrategyError, match=rf"federation\.robust={rule}.*{reason}"):
            strategy.check([1, 2, MAX_RANK])

    @pytest.mark.parametrize(("name", "overrides", "reason"), CASES)
    def test_are_served_without_a_rule(self, name, overrides, reason):
        robust(name, "none", *overrides).check([1, 2, MAX_RANK])

    @pytest.mark.parametrize("name", ["hafl", "fedit"])
    def test_the_others_are_not_refused(self, name):
        robust(name).check([2, 2])


class TestClipping:
    def sizes(self, updates):
        scaling = [{n: m.scaling for n, m in u.plan.modules.items()} for u in updates]
        return [change_size(u.adapter, u.before, s) for u, s in zip(updates, scaling, strict=True)]

    def test_large_changes_shrink_to_a_multiple_of_the_median_and_the_rest_stays(self):
        strategy = strategy_named("hafl")
        updates = updates_of(strategy)
        mixed = [scaled(u, 1e3) if k == 4 else u for k, u in enumerate(updates)]

        clipped = clip_updates(mixed, 2.0)

        usual = float(np.median(self.sizes(mixed)))
        assert self.sizes(clipped)[4] == pytest.approx(2 * usual, rel=1e-4)
        assert all(
            a.adapter is b.adapter for a, b in zip(clipped, mixed, strict=True) if b is not mixed[4]
        )

    def test_without_a_ratio_nothing_is_clipped(self):
        updates = updates_of(strategy_named("hafl"))
        assert clip_updates(updates, None) == updates


class TestOutliers:
    SKEWED = (
        "partition=dirichlet",
        "partition.dirichlet_alpha=0.1",
        "partition.min_examples=4",
        "federation.alone_clients_per_rank=0",
    )

    @pytest.mark.parametrize("strategy", ["hafl", "zero_padding"])
    def test_honest_clients_of_mixed_ranks_and_skewed_data_all_count(self, tmp_path, strategy):
        run_tiny(tmp_path / "a", f"strategy={strategy}", *self.SKEWED)
        clients = records(tmp_path / "a", "client")
        assert {c["rank"] for c in clients} == {2, 4, 8}
        assert len({c["num_examples"] for c in clients}) > 3
        assert [c["error"] for c in clients] == [""] * 10

    @pytest.mark.parametrize("wrong", [{2}, {1, 5}])
    def test_scaled_updates_are_refused_and_the_rest_counts(self, tmp_path, wrong):
        def change(request, reply):
            if request.metadata.dst_node_id not in wrong:
                return reply
            arrays = reply.content.array_records["arrays"]
            arrays["factors"] = Array(arrays["factors"].numpy() * np.float32(1e6))
            return Message(reply.content, reply_to=request)

        run_tiny(tmp_path / "a", *self.SKEWED, app=tampering(change))

        # Node ids start at 1, partitions at 0.
        refused = {
            (c["server_round"], c["partition_id"] + 1)
            for c in records(tmp_path / "a", "client")
            if c["error"].startswith("change of ")
        }
        assert refused == {(r, node) for r in (1, 2) for node in wrong}


def test_all_numbers_of_an_update_are_in_its_size():
    strategy = strategy_named("hafl")
    update = updates_of(strategy)[0]
    moved = Adapter(update.adapter.modules, {n: t + 5 for n, t in update.adapter.head.items()})
    scaling = {n: m.scaling for n, m in update.plan.modules.items()}
    assert change_size(moved, update.before, scaling) > change_size(
        update.adapter, update.before, scaling
    )
