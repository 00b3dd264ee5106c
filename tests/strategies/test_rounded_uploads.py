"""Uploads in fewer bits: the methods' plans, and the updates that they get."""

from dataclasses import replace

import pytest
import torch
from driving import STRATEGIES, Client, nothing, run_options, strategy_named, update_of
from flwr.app import Message, MessageType, MetricRecord

from hafl_app.engines.in_process import server_identity
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.privacy.mechanism import PrivacyError, PrivacyOptions, check_local_plan
from hafl_app.server.method import StrategyError
from hafl_app.server.round_messages import RoundMessages
from hafl_app.server.traffic import Ledger
from hafl_app.wire.records import METRICS, NUM_EXAMPLES, adapter_content
from hafl_app.wire.uploads import encode_upload

CLIENT = Client(rank=3, num_examples=30, partition_id=1)
NEW_COMPONENTS_EACH_ROUND = (
    *("flexlora", "flexlora_change", "hlora", "raflora", "glora"),
    *("flora", "florist", "fedmomentum"),
)
ROUNDED = [name for name in STRATEGIES if not strategy_named(name).traits.uploads_sparsely]


def with_options(name, **options):
    strategy = strategy_named(name)
    strategy.options = run_options(strategy.options, **options)
    return strategy


@pytest.mark.parametrize("name", ROUNDED)
class TestPlans:
    def test_carry_the_setting(self, name):
        for upload in ("fp32", "bf16", "int8"):
            plan = with_options(name, upload=upload).plan(CLIENT.profile, 1)
            assert plan.upload == upload

    def test_feed_back_where_components_stay_what_they_are(self, name):
        plan = with_options(name, upload="int8").plan(CLIENT.profile, 1)
        assert plan.error_feedback == (name not in NEW_COMPONENTS_EACH_ROUND)

    def test_do_not_feed_back_where_nothing_is_rounded_or_it_is_off(self, name):
        for options in ({"upload": "fp32"}, {"upload": "int8", "error_feedback": False}):
            assert not with_options(name, **options).plan(CLIENT.profile, 1).error_feedback

    def test_do_not_feed_back_under_local_privacy(self, name):
        private = {"upload": "int8", "privacy": PrivacyOptions("local_dp")}
        assert not with_options(name, **private).plan(CLIENT.profile, 1).error_feedback

    def test_a_rounded_upload_takes_its_share_of_the_bytes(self, name):
        down, up = with_options(name).payload_bytes(CLIENT.profile)
        head = 4 * (3 * 7 + 3)
        for upload, share in (("bf16", 2), ("int8", 4)):
            got = with_options(name, upload=upload).payload_bytes(CLIENT.profile)
            assert got == (down, (up - head) // share + head)


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "options", "reason"),
        [
            ("flexlora", {"upload": "int8"}, "new components in every round"),
            ("flexlora_change", {"upload": "bf16"}, "new components in every round"),
            ("hafl", {"upload": "fp32"}, "rounds nothing"),
            (
                "zero_padding",
                {"upload": "int8", "privacy": PrivacyOptions("local_dp")},
                "leak into the next",
            ),
        ],
    )
    def test_feedback_that_has_no_meaning_is_refused_if_it_is_asked_for(
        self, name, options, reason
    ):
        with pytest.raises(StrategyError, match=f"error_feedback=true is refused .*{reason}"):
            with_options(name, error_feedback=True, **options).check([2, 3])
        with_options(name, **options).check([2, 3])

    def test_feedback_that_has_one_is_not(self):
        with_options("hafl", error_feedback=True, upload="int8").check([2, 3])

    def test_a_client_under_local_privacy_refuses_a_plan_that_couples_its_uploads(self):
        plan = with_options("zero_padding", upload="int8").plan(CLIENT.profile, 1)
        with pytest.raises(PrivacyError, match="error_feedback=false"):
            check_local_plan(plan)
        check_local_plan(replace(plan, error_feedback=False))


@pytest.mark.parametrize("upload", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", ROUNDED)
def test_a_method_sees_factors_and_not_changes(name, upload):
    strategy = with_options(name, upload=upload)
    profile = replace(CLIENT.profile, node_id=7)
    exchange = RoundMessages(Ledger(), 1, "train")
    with server_identity():
        (request,) = exchange.messages(
            [profile], [strategy.plan(profile, 1)], strategy.dispatch, MessageType.TRAIN
        )
        request.metadata.__dict__["_message_id"] = "1"
        asked = update_of(strategy, CLIENT, nothing)
        only = moved(asked.before).only(asked.plan.uploaded_factors)
        trained = only.filled(asked.before)
        arrays, _ = encode_upload(trained, asked.sent, asked.plan, scores_of(asked.plan), {})
        metrics = MetricRecord({NUM_EXAMPLES: 30, "loss": 0.5})
        reply = Message(adapter_content(arrays, **{METRICS: metrics}), reply_to=request)

    (judged,) = exchange.validate_training([reply])

    assert judged.error == ""
    for module, factors in trained.modules.items():
        got = judged.update.adapter.modules[module]
        # The change is 0.01 to 0.04 a number, the state around 1.
        for arrived, meant in ((got.lora_A, factors.lora_A), (got.lora_B, factors.lora_B)):
            torch.testing.assert_close(arrived, meant, rtol=0, atol=0.04 / 250)
    assert torch.equal(judged.update.adapter.head["bias"], trained.head["bias"])


def moved(before):
    def by(tensor):
        return tensor + 0.01 * (1 + torch.arange(tensor.numel()).reshape(tensor.shape) % 4)

    modules = {n: LoraFactors(by(f.lora_A), by(f.lora_B)) for n, f in before.modules.items()}
    return Adapter(modules, {n: tensor + 1.0 for n, tensor in before.head.items()})


def scores_of(plan):
    if plan.importance == "none":
        return {}
    return {n: torch.rand(len(m.trainable)).numpy() for n, m in plan.modules.items()}
