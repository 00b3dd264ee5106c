"""Promises of HAFLQ beyond HAFL: bits by importance, within the capacity of a client's uplink."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from driving import MAX_RANK, SHAPES, Client, merge, noise, nothing, run_options, strategy_named
from flwr.app import Message, MessageType, MetricRecord

from hafl_app.config.compose import SettingsError, compose
from hafl_app.engines.in_process import server_identity
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.component_lists import BIT_LEVELS
from hafl_app.plan_parts.number_formats import component_bytes
from hafl_app.privacy.mechanism import PrivacyOptions, trained_part
from hafl_app.run.checks import check_settings
from hafl_app.server.compatibility import private_division
from hafl_app.server.method import StrategyError
from hafl_app.server.round_messages import RoundMessages
from hafl_app.server.traffic import Ledger
from hafl_app.wire.records import METRICS, NUM_EXAMPLES, adapter_content
from hafl_app.wire.uploads import encode_upload

CLIENT = Client(rank=4, num_examples=30, partition_id=1)
WIDTHS = {name: (shape.out_features, shape.in_features) for name, shape in SHAPES.items()}
# All four components of both modules (7 x 5 and 6 x 9), by hand: 4 (2 + 2 + 4) + 4 (2 + 3 + 4)
ALL_AT_2 = 4 * 8 + 4 * 9
ALL_AT_16 = 4 * (14 + 10 + 4) + 4 * (12 + 18 + 4)


# Its uplink carries 1,000 bytes a second.
SLOW = replace(CLIENT.profile, bandwidth_kbps=8)


def haflq(*overrides, num_bytes=None, **options):
    """The method with known scores, where `SLOW` may upload so many bytes."""
    strategy = strategy_named("haflq", "strategy.exploration=0", *overrides)
    strategy.options = run_options(strategy.options, upload="mixed", **options)
    if num_bytes is not None:
        strategy.upload_seconds = (num_bytes + 0.5) / 1000
    strategy.recall(
        {"scores": {"query": torch.tensor([0.1, 0.9, 0.5, 0.3]), "dense": torch.arange(4) / 4}}
    )
    return strategy


def bits_of(plan):
    return {
        (name, i): b
        for name, module in plan.modules.items()
        for i, b in zip(module.trainable, module.bits, strict=True)
    }


def within(num_bytes, **options):
    return haflq(num_bytes=num_bytes, **options).plan(SLOW, 1)


class TestBudget:
    def test_a_stated_bandwidth_goes_before_the_channel(self):
        strategy = haflq("strategy.upload_seconds=2")
        stated = replace(CLIENT.profile, bandwidth_kbps=40)

        assert strategy.upload_budget(stated) == 2 * 40_000 // 8
        rate = strategy.channel.rate_bps(1200.0)  # of partition 1
        assert strategy.upload_budget(CLIENT.profile) == int(2 * rate / 8)

    def test_distances_go_round(self):
        strategy = haflq()
        budgets = [strategy.upload_budget(Client(4, 9, i).profile) for i in range(12)]
        assert budgets[:10] == sorted(set(budgets), reverse=True)
        assert budgets[10:] == budgets[:2]

    @pytest.mark.parametrize("num_bytes", [*range(0, ALL_AT_16 + 20, 7)])
    def test_what_is_on_the_wire_is_within_it(self, num_bytes):
        strategy = haflq(num_bytes=num_bytes)
        plan, content = strategy.plan(SLOW, 1), reply_content(strategy, SLOW)

        factors = len(content["arrays"]["factors"].data) + len(content["layout"]["scales"])
        assert factors == plan.upload_bytes(WIDTHS) <= num_bytes
        left = num_bytes - factors
        most = max(component_bytes(16, *w) - component_bytes(8, *w) for w in WIDTHS.values())
        assert left < most or set(bits_of(plan).values()) == {16}


class TestBits:
    def test_a_wide_uplink_carries_sixteen_bits_of_everything(self):
        assert set(bits_of(within(ALL_AT_16)).values()) == {16}

    def test_a_byte_less_and_the_least_important_component_has_fewer(self):
        bits = bits_of(within(ALL_AT_16 - 1))
        assert bits.pop(("dense", 0)) == 8  # of score 0
        assert set(bits.values()) == {16}

    def test_the_narrowest_uplink_for_all_carries_two_bits_of_everything(self):
        assert set(bits_of(within(ALL_AT_2)).values()) == {2}
        less = bits_of(within(ALL_AT_2 - 1))
        assert less.pop(("dense", 0)) == 0
        assert set(less.values()) == {2}

    def test_more_important_components_never_have_fewer_bits(self):
        strategy = haflq()
        scores = {
            (n, i): float(strategy.scores.values[n][i]) for n in SHAPES for i in range(MAX_RANK)
        }
        for num_bytes in range(0, ALL_AT_16, 11):
            bits = bits_of(within(num_bytes))
            ranked = sorted(bits, key=scores.get, reverse=True)
            assert [bits[p] for p in ranked] == sorted(bits.values(), reverse=True)

    def test_one_component_after_the_other(self):
        strategy = haflq("strategy.upgrade=component", num_bytes=ALL_AT_2 + 20)
        bits = bits_of(strategy.plan(SLOW, 1))
        assert bits["query", 1] == 16  # (14 + 10) - (2 + 2) bytes more
        assert sorted(bits.values()) == [2] * 7 + [16]

    def test_equals_are_decided_the_same_way_each_time(self):
        first, second = (haflq(num_bytes=ALL_AT_2 - 20) for _ in range(2))
        for strategy in (first, second):
            strategy.recall({"scores": {}})
        plan = first.plan(SLOW, 1)

        assert plan == second.plan(SLOW, 1)
        # The first components of all modules before the second of any.
        bits = bits_of(plan)
        uploaded = [bits[n, i] > 0 for i in range(4) for n in ("query", "dense")]
        assert uploaded == [True] * 5 + [False] * 3

    def test_a_plan_lists_many_bits_first_and_survives_the_wire(self):
        for num_bytes in (0, 40, 90, 150):
            plan = within(num_bytes)
            assert TrainPlan.from_json(plan.to_json()) == plan
            for module in plan.modules.values():
                assert set(module.bits) <= set(BIT_LEVELS)
                assert list(module.bits) == sorted(module.bits, reverse=True)
                assert sorted(module.trainable) == [0, 1, 2, 3]

    def test_payload_is_counted_in_bits(self):
        head = 4 * (3 * 7 + 3)
        strategy = haflq(num_bytes=90)
        down, up = strategy.payload_bytes(SLOW)

        assert down == 4 * (4 * 12 + 4 * 15) + head
        assert up == strategy.plan(SLOW, 1).upload_bytes(WIDTHS) + head

    @pytest.mark.parametrize("upload", ["fp32", "bf16", "int8"])
    def test_with_other_uploads_it_is_hafl(self, upload):
        hafl, other = (strategy_named(name) for name in ("hafl", "haflq"))
        for strategy in (hafl, other):
            strategy.options = run_options(strategy.options, upload=upload)
        assert hafl.plan(CLIENT.profile, 1) == other.plan(CLIENT.profile, 1)
        assert hafl.payload_bytes(CLIENT.profile) == other.payload_bytes(CLIENT.profile)


class TestSettings:
    def test_bring_their_upload_along(self):
        assert compose(["strategy=haflq"]).federation.upload == "mixed"
        assert compose(["strategy=hafl"]).federation.upload == "fp32"

    def test_keep_hafls_own(self):
        of_hafl, of_haflq = (compose([f"strategy={n}"]).strategy for n in ("hafl", "haflq"))
        assert all(getattr(of_haflq, name) == value for name, value in settings_of(of_hafl).items())

    @pytest.mark.parametrize("strategy", ["hafl", "flexlora", "zero_padding"])
    def test_other_methods_allocate_no_bits(self, strategy):
        settings = compose([f"strategy={strategy}", "federation.upload=mixed"])
        with pytest.raises(SettingsError, match="upload=mixed: only strategy=haflq"):
            check_settings(settings)

    def test_a_channel_that_cannot_be_is_refused(self):
        with pytest.raises(SettingsError, match=r"bandwidth_hz=0\.0: expected 1 to 1e\+12"):
            compose(["strategy=haflq", "strategy.bandwidth_hz=0"])


def settings_of(strategy):
    return {
        name: getattr(strategy, name)
        for name in ("scheme", "aggregation", "selection", "importance", "smoothing", "exploration")
    }


def reply_content(strategy, profile, change=nothing):
    """Answer of a client, with training replaced by a change."""
    plan = strategy.plan(profile, 1)
    sent = strategy.dispatch(plan)
    before, generator = trained_part(sent, plan), torch.Generator().manual_seed(5)
    upload = Adapter({n: change(f, generator) for n, f in before.modules.items()}, sent.head)
    scores = {n: np.ones(len(m.trainable), np.float32) for n, m in plan.modules.items()}
    if plan.importance == "none":
        scores = {}
    arrays, _ = encode_upload(upload, sent, plan, scores, {}, seed=3)
    metrics = MetricRecord({NUM_EXAMPLES: profile.num_examples, "loss": 0.5})
    return adapter_content(arrays, **{METRICS: metrics})


def by_a_tenth(factors, generator):
    del generator
    return LoraFactors(1.1 * factors.lora_A, 1.1 * factors.lora_B)


def update_seen(strategy, profile, change=noise):
    """Update of a client as the method gets it over the wire."""
    profile = replace(profile, node_id=7 + profile.partition_id)
    exchange = RoundMessages(Ledger(), 1, "train")
    with server_identity():
        (request,) = exchange.messages(
            [profile], [strategy.plan(profile, 1)], strategy.dispatch, MessageType.TRAIN
        )
        request.metadata.__dict__["_message_id"] = "1"
        reply = Message(reply_content(strategy, profile, change), reply_to=request)
    (judged,) = exchange.validate_training([reply])
    assert judged.error == ""
    return judged.update


class TestMerging:
    def test_what_was_left_out_is_in_no_average(self):
        strategy = haflq(num_bytes=ALL_AT_2 - 1)
        update = update_seen(strategy, SLOW)
        before = dict(strategy.global_adapter.modules)

        after = merge(strategy, [update])

        assert sorted(update.components("dense")) == [1, 2, 3]
        assert torch.equal(after["dense"].lora_A[0], before["dense"].lora_A[0])
        assert torch.equal(after["dense"].lora_B[:, 0], before["dense"].lora_B[:, 0])
        assert (after["dense"].lora_A[1:] != before["dense"].lora_A[1:]).any(dim=1).all()

    def test_what_arrives_is_what_was_trained_to_a_step_of_its_bits(self):
        strategy = haflq()
        wide = replace(CLIENT.profile, bandwidth_kbps=10**6)
        got = update_seen(strategy, wide, by_a_tenth)

        assert {b for m in got.plan.modules.values() for b in m.bits} == {16}
        for name, factors in got.adapter.modules.items():
            now = strategy.global_adapter.modules[name].select(got.components(name))
            torch.testing.assert_close(factors.lora_A, 1.1 * now.lora_A, rtol=0, atol=1e-5)
            torch.testing.assert_close(factors.lora_B, 1.1 * now.lora_B, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("importance", ["smoothed", "contribution", "magnitude"])
    @pytest.mark.parametrize("robust", ["none", "median"])
    def test_a_round_with_rich_poor_and_cut_off_clients(self, importance, robust):
        strategy = haflq(
            f"strategy.importance={importance}", "strategy.upload_seconds=0.002", robust=robust
        )
        # 25,000 bytes, 100 bytes, and 1 byte
        clients = [(Client(4, 9, 0), 10**5), (Client(3, 20, 1), 400), (Client(2, 5, 2), 4)]
        updates = [
            update_seen(strategy, replace(client.profile, bandwidth_kbps=kbps))
            for client, kbps in clients
        ]
        ranks = [sum(f.rank for f in u.adapter.modules.values()) for u in updates]
        assert ranks == [8, 6, 0]

        after = merge(strategy, updates)

        assert all(f.lora_A.isfinite().all() and f.rank == MAX_RANK for f in after.values())

    def test_one_that_uploads_nothing_changes_nothing(self):
        strategy = haflq(num_bytes=0)
        before = dict(strategy.global_adapter.modules)
        update = update_seen(strategy, SLOW)

        after = merge(strategy, [update])

        assert all(torch.equal(after[n].lora_B, before[n].lora_B) for n in before)
        assert set(update.importance) == set(SHAPES)  # it measures the importance nevertheless


class TestPrivacy:
    def test_nothing_is_fed_back_under_local_privacy(self):
        private = haflq("strategy.source=server", privacy=PrivacyOptions("local_dp")).plan(
            CLIENT.profile, 1
        )
        assert private.upload == "mixed"
        assert not private.error_feedback
        assert haflq().plan(CLIENT.profile, 1).error_feedback

    def test_feedback_that_is_asked_for_there_is_refused(self):
        strategy = haflq(privacy=PrivacyOptions("local_dp"), error_feedback=True)
        with pytest.raises(StrategyError, match="error_feedback=true is refused for haflq"):
            strategy.check([2, 3])

    def test_importance_from_uploads_is_refused_under_central_privacy_as_in_hafl(self):
        with pytest.raises(StrategyError, match="importance=smoothed"):
            private_division(haflq())
