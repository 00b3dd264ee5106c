"""Uploads whose components differ in bits: what is sent, kept back, and refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Message, MessageType, RecordDict
from layout_words import change_layout, layout_of

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
from hafl_app.wire.records import adapter_content
from hafl_app.wire.uploads import decode_upload, encode_upload

SHAPES = {"query": (7, 5), "dense": (6, 9)}  # never square, and modules that differ
BITS = {"query": (16, 4, 0), "dense": (8, 2)}
PLAN = TrainPlan(
    {
        "query": ModulePlan((4, 1, 2, 0), (2, 4, 0), 2.0, BITS["query"]),
        "dense": ModulePlan((0, 3), (3, 0), 2.0, BITS["dense"]),
    },
    importance="smoothed",
    upload="mixed",
    error_feedback=True,
)
IMPORTANCE = {"query": np.array([0.3, 2.0, 0.1], np.float32), "dense": np.ones(2, np.float32)}


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


RECEIVED = noise({"query": 4, "dense": 2}, 1, size=1.0)
CHANGE = noise({"query": 3, "dense": 2}, 2, size=0.1)
BEFORE = Adapter(
    {n: f.select(PLAN.modules[n].trainable_slots) for n, f in RECEIVED.modules.items()},
    RECEIVED.head,
)
UPLOAD = restored(CHANGE, BEFORE)


def encode(plan=PLAN, upload=UPLOAD, errors=None, seed=0):
    return encode_upload(upload, RECEIVED, plan, IMPORTANCE, errors or {}, seed)


def judged(content, plan=PLAN):
    """Change that the server reads from a reply."""
    with server_identity():
        request = Message(RecordDict(), 2, MessageType.TRAIN)
        request.metadata.__dict__["_message_id"] = "m"
        reply = Message(content, reply_to=request)
    arrays = read_update(reply, plan, {"bias": (3,)}, SHAPES)
    check_finite(from_arrays(arrays.modules, arrays.head))
    return arrays


class TestRoundTrip:
    def test_what_arrives_is_what_the_client_knows_that_arrives(self):
        arrays, _ = encode()
        got, known = judged(adapter_content(arrays)), decode_upload(arrays)

        for name in SHAPES:
            for one, other in zip(got.modules[name], known.modules[name], strict=True):
                assert one.dtype == np.float32
                assert np.array_equal(one, other)
            assert np.array_equal(got.importance[name], known.importance[name])
            assert len(got.importance[name]) == len(BITS[name])  # also of what is not uploaded
        assert np.array_equal(got.head["bias"], UPLOAD.head["bias"].numpy())

    def test_components_without_bits_are_not_there(self):
        got = judged(adapter_content(encode()[0]))
        assert got.modules["query"][0].shape == (2, 5)
        assert got.modules["query"][1].shape == (7, 2)
        assert got.modules["dense"][0].shape == (2, 9)

    def test_every_component_is_as_near_as_its_bits_allow(self):
        plan = replace(PLAN, error_feedback=False)  # or few bits would be shrunk
        adapter = from_arrays(judged(adapter_content(encode(plan)[0]), plan).modules, {})
        for name, factors in adapter.modules.items():
            wanted = CHANGE.modules[name]
            for i, bits in enumerate(b for b in BITS[name] if b):
                largest = wanted.lora_A[i].abs().max()
                step = largest / (2 ** (bits - 1) - 1) * (1 + 2**-7)
                error = (factors.lora_A[i] - wanted.lora_A[i]).abs().max()
                assert 0 < error <= step + 1e-6
                if bits > 4:
                    assert error <= step / 2 + 1e-6

    def test_the_seed_decides_few_bits_and_no_others(self):
        one, same, other = (encode(seed=s)[0].modules for s in (1, 1, 2))
        assert np.array_equal(one["dense"][0], same["dense"][0])
        assert np.array_equal(one["dense"][0][0], other["dense"][0][0])  # 8 bits
        assert not np.array_equal(one["dense"][0][1], other["dense"][0][1])  # 2 bits

    def test_factors_take_what_the_plan_says(self):
        content = adapter_content(encode()[0])
        on_the_wire = len(content["arrays"]["factors"].data) + len(content["layout"]["scales"])
        # 16: 10 + 14; 4: 3 + 4; 8: 9 + 6; 2: 3 + 2; and 4 bytes of scales each
        assert on_the_wire == 24 + 7 + 15 + 5 + 4 * 4
        assert PLAN.upload_bytes(SHAPES) == on_the_wire

    def test_a_client_that_may_upload_nothing_still_replies(self):
        nothing = {n: replace(m, bits=(0,) * len(m.bits)) for n, m in PLAN.modules.items()}
        plan = replace(PLAN, modules=nothing)
        arrays, errors = encode(plan)

        got = judged(adapter_content(arrays), plan)

        assert got.modules["query"][0].shape == (0, 5)
        assert len(got.importance["query"]) == 3
        assert plan.upload_bytes(SHAPES) == 0
        torch.testing.assert_close(errors["query"].errors.lora_A, CHANGE.modules["query"].lora_A)

    def test_pruning_and_bits_agree_on_what_is_left(self):
        tail = replace(PLAN, tail=TailPruning(0.4, 0.0, 1), importance="none")
        shorter = Adapter({n: f.select([0]) for n, f in UPLOAD.modules.items()}, UPLOAD.head)
        arrays, _ = encode_upload(shorter, RECEIVED, tail, {}, {})

        assert judged(adapter_content(arrays), tail).modules["dense"][0].shape == (1, 9)
        assert judged(adapter_content(replace(encode()[0], importance={})), tail).modules
        with pytest.raises(ReplyError, match="rank 1, expected 2"):
            judged(adapter_content(arrays), replace(tail, tail=None))


class TestFeedback:
    def test_what_is_kept_is_what_the_server_did_not_get(self):
        arrays, errors = encode()
        for name, (lora_A, lora_B) in decode_upload(arrays).modules.items():
            sent = lora_A.shape[0]
            wanted, before = UPLOAD.modules[name], BEFORE.modules[name]
            missing_A, missing_B = wanted.lora_A - before.lora_A, wanted.lora_B - before.lora_B
            missing_A[:sent] -= torch.from_numpy(lora_A)
            missing_B[:, :sent] -= torch.from_numpy(lora_B)
            assert errors[name].components == PLAN.modules[name].trainable
            torch.testing.assert_close(errors[name].errors.lora_A, missing_A, rtol=0, atol=1e-7)
            torch.testing.assert_close(errors[name].errors.lora_B, missing_B, rtol=0, atol=1e-7)

    def test_what_was_left_out_is_uploaded_when_there_are_bits(self):
        _, errors = encode()
        full = {n: replace(m, bits=(16,) * len(m.bits)) for n, m in PLAN.modules.items()}
        plan = replace(PLAN, modules=full)

        arrays, _ = encode(plan, upload=BEFORE, errors=errors)

        got = decode_upload(arrays).modules["query"][0][2]
        np.testing.assert_allclose(got, CHANGE.modules["query"].lora_A[2], atol=1e-5)

    def test_without_it_nothing_is_kept(self):
        assert encode(replace(PLAN, error_feedback=False))[1] == {}


class TestRefusals:
    def refused(self, content, match, plan=PLAN):
        with pytest.raises(ReplyError, match=match) as caught:
            judged(content, plan)
        assert "\n" not in str(caught.value)

    def test_other_bits_than_planned(self):
        more = replace(PLAN.modules["dense"], bits=(16, 2))
        other = replace(PLAN, modules={**PLAN.modules, "dense": more})
        self.refused(adapter_content(encode(other)[0]), "dense: bits '16,2', expected '8,2'")

    def test_more_components_than_planned(self):
        more = replace(PLAN.modules["query"], bits=(16, 4, 4))
        other = replace(PLAN, modules={**PLAN.modules, "query": more})
        self.refused(adapter_content(encode(other)[0]), "query: rank 3, expected 2")

    @pytest.mark.parametrize("upload", ["fp32", "int8"])
    def test_other_numbers_than_planned(self, upload):
        plain = {n: replace(m, bits=()) for n, m in PLAN.modules.items()}
        other = replace(PLAN, modules=plain, upload=upload, error_feedback=False)
        self.refused(adapter_content(encode(other)[0]), f"factors in {upload}, expected mixed")
        self.refused(
            adapter_content(encode()[0]), f"factors in mixed, expected {upload}", plan=other
        )

    @pytest.mark.parametrize("wrong", [np.nan, np.inf])
    def test_scales_that_are_not_finite(self, wrong):
        arrays, _ = encode()
        arrays.scales["dense"][0][1] = np.float32(wrong).view(np.uint32) >> 16
        self.refused(adapter_content(arrays), "dense: lora_A: 9 of 18 numbers are not finite")

    def test_codes_out_of_range(self):
        content = adapter_content(encode()[0])
        array = content["arrays"]["factors"]
        data = bytearray(array.data)
        data[0:2] = b"\xff\xff"  # of 16 bits
        array.data = bytes(data)
        self.refused(content, "factors: code 32768 of 16 bits, expected -32767 to 32767")

    def test_bits_that_the_layout_does_not_say(self):
        content = adapter_content(encode()[0])
        said = layout_of(content)
        assert said["bits"] == ["16,4", "8,2"]
        change_layout(content, bits=["16,4", "2,8"])
        self.refused(content, "dense: bits '2,8', expected '8,2'|factors: ")

    def test_a_reply_of_sixteen_bits_is_too_large_for_a_plan_of_two(self):
        shapes = {"query": (30_000, 50_000)}
        module = ModulePlan((0, 1, 2), (0, 2), bits=(2, 0))
        plan = TrainPlan({"query": module}, upload="mixed")
        factors = 20_000 + 4  # 2 bits of 80,000 numbers, and two scales
        assert plan.upload_bytes(shapes) == factors
        limit = int(1.5 * factors) + 64 * 1024 + 256 + 2 * len("query")
        check_size(limit, plan, {}, shapes)
        with pytest.raises(ReplyError, match="expected at most"):
            check_size(limit + 1, plan, {}, shapes)
