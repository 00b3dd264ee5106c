"""Uploads under a plan, encoded by the client and decoded by the server."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, Message, MessageType, MetricRecord, RecordDict

from hafl_app.engines.in_process import server_identity
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.plan_parts.tail_pruning import TailPruning
from hafl_app.server.reply_validation import (
    ReplyError,
    check_finite,
    check_size,
    read_update,
    restored,
)
from hafl_app.training.adapter_arrays import from_arrays
from hafl_app.wire.records import METRICS, adapter_content, message_bytes
from hafl_app.wire.uploads import decode_upload, encode_upload

# Never square, and modules that differ.
SHAPES = {"query": (7, 5), "dense": (6, 9)}
PLAN = TrainPlan(
    {"query": ModulePlan((4, 1, 2), (2, 4), 2.0), "dense": ModulePlan((0, 3), (0, 3), 2.0)},
    importance="smoothed",
    upload="int8",
)
HEAD_SHAPE = {"bias": (3,)}
IMPORTANCE = {"query": np.array([0.3, 2.0], np.float32), "dense": np.array([7.0, 0.0], np.float32)}


def noise(ranks, seed, size):
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: LoraFactors(
                size * torch.randn(ranks[name], width, generator=generator),
                size * torch.randn(height, ranks[name], generator=generator),
            )
            for name, (height, width) in SHAPES.items()
        },
        {"bias": torch.randn(3, generator=generator)},
    )


RECEIVED = noise({"query": 3, "dense": 2}, 1, size=100.0)
CHANGE = noise({"query": 2, "dense": 2}, 2, size=1e-3)  # small beside the state
BEFORE = Adapter(
    {n: f.select(PLAN.modules[n].trainable_slots) for n, f in RECEIVED.modules.items()},
    RECEIVED.head,
)
UPLOAD = restored(CHANGE, BEFORE)


def received(content, plan):
    """Let the server read a reply, up to what a method sees."""
    with server_identity():
        request = Message(RecordDict(), 2, MessageType.TRAIN)
        request.metadata.__dict__["_message_id"] = "m"
        reply = Message(content, reply_to=request)
    arrays = read_update(reply, plan, HEAD_SHAPE, SHAPES)
    adapter = from_arrays(arrays.modules, arrays.head)
    adapter = adapter if plan.upload == "fp32" else restored(adapter, BEFORE)
    check_finite(adapter)
    return arrays, adapter


def content_of(plan, upload=UPLOAD, errors=None):
    arrays, _ = encode_upload(upload, RECEIVED, plan, IMPORTANCE, errors or {})
    return adapter_content(arrays, **{METRICS: MetricRecord({"loss": 0.5})})


def bound(change, numbers):
    """Largest error that rounding may make in a matrix of component vectors in its rows."""
    if numbers == "bf16":
        return change.abs() * 2**-8
    return change.abs().amax(1, keepdim=True) / 254 * (1 + 2**-7)


class TestRoundTrip:
    def test_float32_arrives_bit_for_bit(self):
        plan = replace(PLAN, upload="fp32")
        _, got = received(content_of(plan), plan)

        for name, factors in UPLOAD.modules.items():
            assert torch.equal(got.modules[name].lora_A, factors.lora_A)
            assert torch.equal(got.modules[name].lora_B, factors.lora_B)

    @pytest.mark.parametrize("numbers", ["bf16", "int8"])
    def test_the_error_is_relative_to_the_change_and_not_to_the_state(self, numbers):
        plan = replace(PLAN, upload=numbers)
        _, got = received(content_of(plan), plan)

        for name, factors in UPLOAD.modules.items():
            before = BEFORE.modules[name]
            for after, sent, arrived in (
                (factors.lora_A, before.lora_A, got.modules[name].lora_A),
                (factors.lora_B.T, before.lora_B.T, got.modules[name].lora_B.T),
            ):
                error = (arrived - after).abs()
                rounding = 2**-23 * sent.abs()  # of the float32 sum
                assert (error <= bound(after - sent, numbers) + rounding).all()
                assert error.max() > 0

    @pytest.mark.parametrize("numbers", ["bf16", "int8"])
    def test_the_head_arrives_bit_for_bit_and_scores_nearly(self, numbers):
        plan = replace(PLAN, upload=numbers)
        arrays, got = received(content_of(plan), plan)

        assert torch.equal(got.head["bias"], UPLOAD.head["bias"])
        for name, scores in IMPORTANCE.items():
            assert arrays.importance[name].dtype == np.float32
            np.testing.assert_allclose(arrays.importance[name], scores, rtol=2**-8)

    @pytest.mark.parametrize("numbers", ["bf16", "int8"])
    def test_pruned_uploads_are_changes_of_the_components_that_are_left(self, numbers):
        plan = replace(PLAN, upload=numbers, tail=TailPruning(0.5, 0.0, 1), importance="none")
        pruned = Adapter({n: f.select([0]) for n, f in UPLOAD.modules.items()}, UPLOAD.head)
        arrays, _ = encode_upload(pruned, RECEIVED, plan, {}, {})
        before = Adapter({n: f.select([0]) for n, f in BEFORE.modules.items()})
        decoded = decode_upload(arrays)

        got = restored(from_arrays(decoded.modules, decoded.head), before)

        assert got.modules["query"].rank == 1
        torch.testing.assert_close(
            got.modules["query"].lora_B, pruned.modules["query"].lora_B, atol=1e-4, rtol=1e-5
        )


class TestFeedback:
    FED_BACK = replace(PLAN, error_feedback=True)

    def test_errors_are_kept_by_module_and_global_component(self):
        _, errors = encode_upload(UPLOAD, RECEIVED, self.FED_BACK, IMPORTANCE, {})

        assert errors["query"].components == (2, 4)
        assert errors["dense"].components == (0, 3)

    def test_what_is_kept_is_what_the_server_did_not_get(self):
        arrays, errors = encode_upload(UPLOAD, RECEIVED, self.FED_BACK, IMPORTANCE, {})

        for name, (lora_A, lora_B) in decode_upload(arrays).modules.items():
            wanted, before = UPLOAD.modules[name], BEFORE.modules[name]
            missing_A = wanted.lora_A - before.lora_A - torch.from_numpy(lora_A)
            missing_B = wanted.lora_B - before.lora_B - torch.from_numpy(lora_B)
            assert torch.equal(errors[name].errors.lora_A, missing_A)
            assert torch.equal(errors[name].errors.lora_B, missing_B)
            assert missing_A.abs().max() > 0

    def test_the_next_upload_makes_up_for_it(self):
        _, errors = encode_upload(UPLOAD, RECEIVED, self.FED_BACK, IMPORTANCE, {})
        unchanged = BEFORE

        arrays, _ = encode_upload(unchanged, RECEIVED, self.FED_BACK, IMPORTANCE, errors)

        got = decode_upload(arrays).modules["query"][0]
        owed = errors["query"].errors.lora_A.numpy()
        assert np.abs(got - owed).max() <= np.abs(owed).max() / 200
        assert np.abs(owed).max() > 0

    def test_without_it_nothing_is_kept_or_added(self):
        arrays, errors = encode_upload(UPLOAD, RECEIVED, PLAN, IMPORTANCE, {})
        assert errors == {}
        _, owed = encode_upload(UPLOAD, RECEIVED, self.FED_BACK, IMPORTANCE, {})

        again, errors = encode_upload(UPLOAD, RECEIVED, PLAN, IMPORTANCE, owed)

        assert np.array_equal(again.modules["query"][0], arrays.modules["query"][0])
        assert errors == owed


class TestRefusals:
    def refused(self, content, match, plan=PLAN):
        with pytest.raises(ReplyError, match=match) as caught:
            received(content, plan)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("asked", ["fp32", "bf16", "int8"])
    @pytest.mark.parametrize("came", ["fp32", "bf16", "int8"])
    def test_other_numbers_than_the_plan_asked_for_are_refused(self, asked, came):
        if asked == came:
            return
        content = content_of(replace(PLAN, upload=came))
        self.refused(content, f"factors in {came}, expected {asked}", replace(PLAN, upload=asked))

    @pytest.mark.parametrize("wrong", [np.nan, np.inf])
    @pytest.mark.parametrize("code", [0, 3])
    def test_scales_that_are_not_finite_are_refused_whatever_they_scale(self, wrong, code):
        arrays, _ = encode_upload(UPLOAD, RECEIVED, PLAN, IMPORTANCE, {})
        arrays.scales["dense"][0][1] = np.float32(wrong).view(np.uint32) >> 16
        arrays.modules["dense"][0][1] = code
        self.refused(adapter_content(arrays), r"dense: lora_A: 9 of 18 numbers are not finite")

    def test_bits_that_are_no_finite_number_are_refused(self):
        plan = replace(PLAN, upload="bf16")
        arrays, _ = encode_upload(UPLOAD, RECEIVED, plan, IMPORTANCE, {})
        arrays.modules["query"][1][0, 1] = 0x7F80  # infinity
        self.refused(adapter_content(arrays), "query: lora_B: 1 of 14 .* first is inf", plan)

    @pytest.mark.parametrize("bits", [0x7FC0, 0xBF80])  # NaN, -1
    def test_scores_that_are_wrong_are_refused(self, bits):
        arrays, _ = encode_upload(UPLOAD, RECEIVED, PLAN, IMPORTANCE, {})
        arrays.importance["query"][0] = bits
        self.refused(adapter_content(arrays), "query: importance")

    def test_a_change_too_large_to_be_added_is_refused(self):
        large = Adapter({"query": LoraFactors(torch.full((2, 5), 3e38), torch.ones(7, 2))})
        with pytest.raises(ReplyError, match="query: lora_A: 10 of 10 numbers are not finite"):
            check_finite(restored(large, large))

    def test_a_reply_in_float32_is_too_large_for_a_plan_in_int8(self):
        shapes = {"query": (3000, 5000)}
        plan = TrainPlan({"query": ModulePlan((0, 1, 2), (0, 2))}, upload="int8")
        constant = 64 * 1024 + 256 + 2 * len("query")
        check_size(int(1.5 * 2 * 8000) + constant, plan, {}, shapes)
        with pytest.raises(ReplyError, match="expected at most"):
            check_size(int(1.5 * 2 * 8000) + constant + 1, plan, {}, shapes)

    def test_an_honest_reply_is_not(self):
        content = content_of(PLAN)
        with server_identity():
            size = message_bytes(Message(content, 2, MessageType.TRAIN))
        check_size(size, PLAN, HEAD_SHAPE, SHAPES)

    def test_tampered_numbers_of_another_kind_are_refused(self):
        plan = replace(PLAN, importance="none")
        arrays, _ = encode_upload(UPLOAD, RECEIVED, plan, {}, {})
        content = adapter_content(arrays)
        content["arrays"]["factors"] = Array(np.zeros(54, np.float32))
        self.refused(content, "factors in fp32, expected int8", plan)
