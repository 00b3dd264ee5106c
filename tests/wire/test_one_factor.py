"""Uploads of one factor: its numbers alone, in every format, and what the server makes of them."""

import numpy as np
import pytest
import torch
from flwr.app import Message, MessageType, MetricRecord, RecordDict
from training_law import factor_bytes

from hafl_app.engines.in_process import server_identity
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.server.reply_validation import completed, read_update
from hafl_app.training.adapter_arrays import from_arrays
from hafl_app.wire.records import METRICS, adapter_content
from hafl_app.wire.uploads import encode_upload

# Never square, and modules that differ.
SHAPES = {"query": (7, 5), "dense": (6, 9), "output": (4, 8)}
FACTORS = {"query": "A", "dense": "B", "output": "both"}
FORMATS = ["fp32", "bf16", "int8", "mixed"]


def plan_of(upload, factors=FACTORS, feedback=False):
    bits = (16, 8) if upload == "mixed" else ()
    modules = {n: ModulePlan((3, 0, 2), (2, 3), 2.0, bits, factors[n]) for n in SHAPES}
    return TrainPlan(modules, head="frozen", upload=upload, error_feedback=feedback)


def noise(rank, seed, size):
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: LoraFactors(
                size * torch.randn(rank, width, generator=generator),
                size * torch.randn(height, rank, generator=generator),
            )
            for name, (height, width) in SHAPES.items()
        }
    )


RECEIVED, CHANGE = noise(3, 1, 10.0), noise(2, 2, 1e-2)
BEFORE = RECEIVED.map(lambda f: f.select((2, 0)))  # where components 2 and 3 are held
TRAINED = Adapter(
    {
        n: LoraFactors(f.lora_A + CHANGE.modules[n].lora_A, f.lora_B + CHANGE.modules[n].lora_B)
        for n, f in BEFORE.modules.items()
    }
)


def encoded(plan, trained=TRAINED, errors=None):
    return encode_upload(trained, RECEIVED, plan, {}, errors or {})


def server_reads(arrays, plan):
    with server_identity():
        request = Message(RecordDict(), 2, MessageType.TRAIN)
        request.metadata.__dict__["_message_id"] = "m"
        content = adapter_content(arrays, **{METRICS: MetricRecord({"loss": 0.5})})
        reply = Message(content, reply_to=request)
    read = read_update(reply, plan, {}, SHAPES)
    return completed(from_arrays(read.modules, read.head), BEFORE, plan)


@pytest.mark.parametrize("upload", FORMATS)
class TestUpload:
    def test_the_trained_factor_arrives_and_the_other_one_is_what_was_sent(self, upload):
        got = server_reads(encoded(plan_of(upload))[0], plan_of(upload))

        for name, factors in FACTORS.items():
            for letter, part in (("A", "lora_A"), ("B", "lora_B")):
                after, before = (getattr(x.modules[name], part) for x in (got, BEFORE))
                if factors not in (letter, "both"):
                    assert torch.equal(after, before)
                    continue
                meant = getattr(TRAINED.modules[name], part)
                error = float((after - meant).norm() / (meant - before).norm())
                assert error < (1e-9 if upload == "fp32" else 0.02)

    def test_a_factor_left_out_before_or_here_makes_no_difference(self, upload):
        plan = plan_of(upload)
        whole, _ = encoded(plan)
        left_out, _ = encoded(plan, TRAINED.only(FACTORS))

        for name, pair in whole.modules.items():
            for one, other in zip(pair, left_out.modules[name], strict=True):
                assert np.array_equal(one, other)

    def test_takes_the_bytes_that_the_plan_says(self, upload):
        plan = plan_of(upload)
        content = adapter_content(encoded(plan)[0])
        assert factor_bytes(content, plan) == plan.upload_bytes(SHAPES)

    def test_has_the_scales_of_its_own_numbers_alone(self, upload):
        content = adapter_content(encoded(plan_of(upload))[0])
        expected = 2 * 2 * 4 if upload in ("int8", "mixed") else 0  # of two factors, and of one
        assert len(content["layout"].get("scales", b"")) == expected


@pytest.mark.parametrize("upload", FORMATS[1:])
class TestFeedback:
    def test_what_the_other_factor_is_owed_waits_for_it(self, upload):
        only_A, only_B = (dict.fromkeys(SHAPES, factor) for factor in "AB")
        _, owed = encoded(plan_of(upload, only_A, feedback=True))
        still = BEFORE  # training moved nothing: what is uploaded is what was owed

        arrays, after = encoded(plan_of(upload, only_B, feedback=True), still, owed)

        for name, kept in owed.items():
            assert kept.errors.lora_A.abs().max() > 0
            assert not kept.errors.lora_B.any()
            assert torch.equal(after[name].errors.lora_A, kept.errors.lora_A)
            assert arrays.modules[name][0].shape == (2, 0)

    def test_the_trained_factor_keeps_what_the_server_did_not_get(self, upload):
        plan = plan_of(upload, dict.fromkeys(SHAPES, "B"), feedback=True)
        arrays, owed = encoded(plan)
        got = server_reads(arrays, plan)

        for name, kept in owed.items():
            lost = TRAINED.modules[name].lora_B - got.modules[name].lora_B
            torch.testing.assert_close(kept.errors.lora_B, lost, rtol=0, atol=4e-6)
            assert not kept.errors.lora_A.any()
