"""Ranks by layer type, from conf/ranks over the profile to every method's plan."""

import shlex
from dataclasses import dataclass, replace

import pytest
import torch
from driving import (
    MAX_RANK,
    STRATEGIES,
    Client,
    merge,
    nothing,
    run_options,
    strategy_named,
    update_of,
)
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from peft.utils.other import get_pattern_key
from running import TINY, run_tiny

from hafl_app.client_app import app as client_app
from hafl_app.config.compose import CONF, compose
from hafl_app.engines.in_process import InProcessGrid, server_identity
from hafl_app.lowrank.factors import Adapter
from hafl_app.lowrank.svd import singular_values, truncated_svd
from hafl_app.run import build
from hafl_app.run.preflight import check
from hafl_app.server.method import StrategyError
from hafl_app.server.node_directory import NodeDirectory
from hafl_app.wire.node_profile import PROFILE, NodeProfile

LAYER = "encoder.layer.3."
BERT = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
FEED_FORWARD = {"intermediate.dense", "output.dense"}


@dataclass(frozen=True)
class PatternedClient(Client):
    rank_pattern: tuple[tuple[str, int], ...] = ()

    @property
    def profile(self) -> NodeProfile:
        return replace(super().profile, rank_pattern=dict(self.rank_pattern))


def profile(rank: int, pattern: dict[str, int]) -> NodeProfile:
    return NodeProfile(0, 3, rank, 10, "cpu", rank_pattern=pattern)


def received(record: ConfigRecord) -> NodeProfile:
    with server_identity():
        query = Message(RecordDict(), 5, MessageType.QUERY)
        return NodeProfile.from_reply(Message(RecordDict({PROFILE: record}), reply_to=query))


class TestRankOf:
    @pytest.mark.parametrize(
        "pattern",
        [
            {"output.dense": 7},
            {r"layer\.\d+\.output\.dense": 7},
            {"query": 2, ".*dense": 3, "intermediate.dense": 9},
            {"uery": 5},
            {"encoder": 5},
            {},
        ],
    )
    def test_is_pefts(self, pattern):
        for name in BERT:
            peft = pattern.get(get_pattern_key(list(pattern), LAYER + name), 4)
            assert profile(4, pattern).rank_of(LAYER + name) == peft

    def test_feed_forward_is_not_the_attentions_output(self):
        settings = compose(["ranks=flexlora_uniform", "lora.max_rank=200"])
        tier = build.client_tiers(settings, 8)[5]
        ranks = {n: profile(tier.rank, tier.rank_pattern).rank_of(LAYER + n) for n in BERT}
        assert ranks == {n: 200 if n in FEED_FORWARD else 30 for n in BERT}

    @pytest.mark.parametrize("name", ["uniform", "normal", "heavy_tail_light", "heavy_tail_strong"])
    def test_flexloras_types_are_those_of_language_models_too(self, name):
        settings = compose([f"ranks=flexlora_{name}", "lora.max_rank=200"])
        (tier,) = [tier for tier in settings.ranks.tiers if tier.rank_pattern]
        its = profile(tier.rank, tier.rank_pattern)

        for layer in ("self_attn.q_proj", "self_attn.o_proj", "self_attn.qkv_proj"):
            assert its.rank_of(f"model.layers.3.{layer}") == 30
        for layer in ("mlp.gate_proj", "mlp.down_proj", "mlp.gate_up_proj"):
            assert its.rank_of(f"model.layers.3.{layer}") == 200


class TestWire:
    def test_survives(self):
        sent = profile(4, {r"layer\.\d+\.output\.dense": 7, "query": 1})
        got = received(sent.to_record())
        assert list(got.rank_pattern.items()) == list(sent.rank_pattern.items())
        assert got.ranks == (4, 7, 1)

    @pytest.mark.parametrize(
        "text",
        ['{"query":0}', '{"query":2.5}', '{"query":"2"}', '{"query":true}', '{"(":2}', "[3]", "x"],
    )
    def test_nonsense_is_refused(self, text):
        record = profile(4, {}).to_record()
        record["rank-pattern"] = text
        with pytest.raises(ValueError, match="rank pattern"):
            received(record)


class TestPlans:
    @pytest.mark.parametrize("name", [s for s in STRATEGIES if s != "fedit"])
    def test_each_module_has_its_budget(self, name):
        # Else hafl_plus trains one factor alone, of twice as many.
        overrides = ["strategy.factors=both"] if name == "hafl_plus" else []
        plan = strategy_named(name, *overrides).plan(profile(1, {"dense": 3}), 1)
        if plan.density < 1:  # it trains everything, and its budgets' share of it travels
            assert plan.density == (1 + 3) / (2 * MAX_RANK)
            return
        assert {n: m.num_trained for n, m in plan.modules.items()} == {"query": 1, "dense": 3}

    def test_the_scaling_is_of_the_modules_own_rank(self):
        strategy = strategy_named("zero_padding")
        strategy.options = run_options(lora_alpha=6, scaling="per_rank")
        plan = strategy.plan(profile(1, {"dense": 3}), 1)
        assert {n: m.scaling for n, m in plan.modules.items()} == {"query": 6, "dense": 2}

    @pytest.mark.parametrize("selection", ["importance", "random"])
    def test_over_the_model_hafl_spends_the_sum(self, selection):
        strategy = strategy_named("hafl", "strategy.scope=model", f"strategy.selection={selection}")
        plan = strategy.plan(profile(1, {"dense": 3}), 1)
        assert sum(len(m.trainable) for m in plan.modules.values()) == 4

    def test_fedit_refuses_them(self):
        with pytest.raises(StrategyError, match="one rank"):
            strategy_named("fedit").check(profile(1, {"dense": 3}).ranks)

    def test_layer_types_collapse_to_their_own_lowest_rank(self):
        strategy = strategy_named("flexlora")
        before = {n: truncated_svd(f, MAX_RANK) for n, f in strategy.global_adapter.modules.items()}
        strategy.global_adapter = Adapter(before)
        clients = [PatternedClient(1, 30, 0, None, (("dense", 3),)), Client(4, 10, 1)]

        after = merge(strategy, [update_of(strategy, client, nothing) for client in clients])

        for name, factors in (("query", [1, 0.25, 0.25, 0.25]), ("dense", [1, 1, 1, 0.25])):
            got = singular_values(after[name]) / singular_values(before[name])
            expected = torch.tensor(factors, dtype=torch.float64)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@pytest.mark.slow
class TestConfigs:
    @pytest.mark.parametrize("ranks", sorted(p.stem for p in (CONF / "ranks").glob("*.yaml")))
    def test_every_file_composes(self, ranks):
        tiers = build.client_tiers(compose([f"ranks={ranks}", "lora.max_rank=200"]), 30)
        assert len(tiers) == 30

    @pytest.mark.parametrize(
        ("ranks", "total"),
        # LoRA-A2, Table 8, HetLoRA = FlexLoRA, in billions of numbers.
        [("loraa2_uniform", 3.09), ("loraa2_heavy_tail", 1.06), ("loraa2_normal", 1.34)],
    )
    def test_lora_a2s_upload_totals(self, ranks, total):
        settings = compose([f"ranks={ranks}", "lora.max_rank=32"])
        # RoBERTa-base, six linear layers in twelve blocks: numbers per unit of rank; 50 rounds.
        per_rank = 12 * (4 * (768 + 768) + 2 * (768 + 3072))
        uploaded = sum(build.client_ranks(settings, 30)) * per_rank * 50
        assert round(uploaded / 1e9, 2) == total

    def test_shuffling_moves_whole_tiers(self):
        overrides = ["ranks=flexlora_normal", "lora.max_rank=200"]
        plain, shuffled = (
            [(t.rank, len(t.rank_pattern)) for t in build.client_tiers(compose(o), 25)]
            for o in (overrides, [*overrides, "ranks.order=shuffled"])
        )
        assert plain != shuffled
        assert sorted(plain) == sorted(shuffled)

    def test_the_largest_rank_is_checked_before_anything_starts(self):
        overrides = ["ranks=flexlora_uniform", "model=tiny_random", "lora.max_rank=30"]
        with pytest.raises(StrategyError, match="rank 200"):
            check(compose(overrides))


@pytest.mark.slow
class TestRun:
    TIERS = "ranks.tiers=[{rank:1,share:1},{rank:2,share:1,rank_pattern:{%s:5}}]"

    def test_larger_budgets_of_a_layer_type_are_trained(self, tmp_path):
        plain = "ranks.tiers=[{rank:1,share:1},{rank:2,share:1}]"
        few = ("strategy=flexlora", "federation.num_clients=2", "federation.num_rounds=1")
        up = [
            run_tiny(tmp_path / name, *few, tiers)["bytes"]["train"]["up"]
            for name, tiers in (("plain", plain), ("pattern", self.TIERS % "intermediate.dense"))
        ]
        # Two layers, 3 more components of 32 + 48 numbers each.
        assert abs(up[1] - up[0] - 2 * 3 * (32 + 48) * 4) < 100

    def test_a_device_that_knows_its_rank_has_no_pattern(self):
        overrides = (*TINY, "federation.num_clients=2", self.TIERS % "intermediate.dense")
        grid = InProcessGrid(client_app, 2, {"overrides": shlex.join(overrides)})
        grid._contexts[2].node_config["rank"] = 3
        with server_identity():
            assert [p.ranks for p in NodeDirectory(9).refresh(grid)] == [(1,), (3,)]
            grid._contexts[2].node_config.pop("rank")
            assert [p.ranks for p in NodeDirectory(9).refresh(grid)] == [(1,), (2, 5)]

    def test_a_pattern_without_effect_is_refused(self):
        settings = compose([*TINY, "federation.num_clients=2", self.TIERS % "ffn.lin1"])
        with pytest.raises(ValueError, match=r"ranks\.tiers: .*ffn\.lin1.*matches none"):
            check(settings)

    def test_a_node_with_such_a_pattern_is_left_out(self, tmp_path):
        summary = run_tiny(tmp_path, "federation.num_clients=2", self.TIERS % "ffn.lin1")
        (reason,) = summary["left_out"].values()
        assert "ffn.lin1" in reason
