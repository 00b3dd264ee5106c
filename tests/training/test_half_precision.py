"""A base model whose frozen weights are rounded once: what is rounded, and what stays."""

from dataclasses import replace

import pytest
import torch
from causal_factories import TINY_CAUSAL
from torch import nn
from training_factories import CPU, LABELS, SPEC, TINY, plan_for, random_adapter, random_rows

from hafl_app.training import device as device_module
from hafl_app.training.causal import CausalSpec
from hafl_app.training.classifier import ClassifierSpec
from hafl_app.training.device import resolve_precision
from hafl_app.training.evaluate import predict_logits
from hafl_app.training.half_precision import _attention_in_float32
from hafl_app.training.local import train
from hafl_app.training.settings import BaseSpec, TrainOptions
from hafl_app.training.vision import ImageSpec

VIT = {
    "model_type": "vit",
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
IMAGES = BaseSpec("", random_weights=True, task="image_classification", pooling="cls", shape=VIT)
SPECS = {
    "mean pooling": SPEC,
    "own head": ClassifierSpec(replace(TINY, pooling="cls"), LABELS, seed=7),
    "causal": CausalSpec(TINY_CAUSAL, seed=7),
    "images": ImageSpec(IMAGES, LABELS, seed=7),
    "quantized": ClassifierSpec(replace(TINY, quantization="bf16"), LABELS, seed=7),
}


def dtypes(model) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


@pytest.fixture(params=SPECS)
def model(request):
    return SPECS[request.param].build()


def inputs(model) -> tuple[torch.Tensor, ...]:
    if isinstance(model, SPECS["images"].build().__class__):
        return (torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)
    ids = torch.arange(1, 19).view(3, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return ids, mask


class TestWeights:
    def test_frozen_ones_are_rounded_and_trained_ones_are_not(self, model):
        model.load_whole(random_adapter(model, 2))
        head = {id(p) for p in model.head_module.parameters()}
        model.hold_weights("bf16")

        for name, parameter in model.named_parameters():
            stays = ".lora_" in name or id(parameter) in head
            assert parameter.dtype == (torch.float32 if stays else torch.bfloat16), name

    def test_positions_and_other_buffers_are_not_rounded(self, model):
        before = {name: buffer.dtype for name, buffer in model.named_buffers()}
        model.hold_weights("bf16")

        assert {name: buffer.dtype for name, buffer in model.named_buffers()} == before

    def test_nothing_is_cast_again_in_the_next_step(self, model):
        with model.computing("bf16"):
            before = {name: p.data_ptr() for name, p in model.named_parameters()}
        with model.computing("bf16"):
            pass

        assert {name: p.data_ptr() for name, p in model.named_parameters()} == before

    def test_back_in_fp32_they_are_what_they_were(self, model):
        before = {name: p.clone() for name, p in model.named_parameters()}
        attention = model.base.config._attn_implementation
        model.hold_weights("bf16")
        model.hold_weights("fp32")

        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), name
            assert parameter.dtype == before[name].dtype
        assert model.base.config._attn_implementation == attention == "sdpa"

    def test_going_back_draws_no_random_numbers_of_the_run(self):
        model = SPEC.build()
        model.hold_weights("bf16")
        torch.manual_seed(3)
        model.hold_weights("fp32")

        drawn = torch.rand(1)
        torch.manual_seed(3)
        assert torch.equal(drawn, torch.rand(1))


class TestResults:
    def test_logits_are_close(self, model):
        model.eval()
        with torch.no_grad(), model.computing("fp32"):
            whole = model(*inputs(model))
        with torch.no_grad(), model.computing("bf16"):
            rounded = model(*inputs(model))

        assert rounded.dtype == torch.bfloat16
        error = (rounded.float() - whole).norm() / whole.norm()
        assert 0 < error < 0.02

    def test_activations_are_bf16_throughout(self):
        model, seen = SPEC.build(), {}
        for name, module in model.base.named_modules():
            if isinstance(module, nn.LayerNorm | nn.Embedding):
                module.register_forward_hook(
                    lambda _, __, output, name=name: seen.update({name: output.dtype})
                )
        with model.computing("bf16"):
            model(*inputs(model))

        assert set(seen.values()) == {torch.bfloat16}
        assert "encoder.layer.1.output.LayerNorm" in seen

    def test_a_training_ends_where_it_does_in_fp32(self):
        rows, results = random_rows(48), {}
        for precision in ("fp32", "bf16"):
            model = SPEC.build()
            adapter = random_adapter(model, 3)
            plan = plan_for(adapter, (0, 1), importance="smoothed", local_epochs=2)
            options = TrainOptions(batch_size=8, precision=precision)
            results[precision] = train(model, adapter, plan, rows, options, seed=1)
        whole, half = results["fp32"], results["bf16"]

        assert half.loss == pytest.approx(whole.loss, rel=0.02)
        assert half.loss != whole.loss
        for name, factors in half.adapter.modules.items():
            assert factors.lora_A.dtype == factors.lora_B.dtype == torch.float32
            assert half.importance[name].dtype == torch.float32
            assert factors.lora_B.bfloat16().float().ne(factors.lora_B).any()  # not rounded
        assert all(t.dtype == torch.float32 for t in half.adapter.head.values())

    @pytest.mark.parametrize("precisions", [("bf16",), ("bf16", "fp32")])
    def test_a_model_that_was_scored_first_is_trained(self, precisions):
        model, rows = SPEC.build(), random_rows(6)
        adapter = random_adapter(model, 2)
        model.load_whole(adapter)
        for precision in precisions:
            predict_logits(model, rows, precision)

        options = TrainOptions(batch_size=6, precision=precisions[-1])
        assert train(model, adapter, plan_for(adapter), rows, options, seed=1).steps == 1


class TestAttention:
    @pytest.mark.parametrize("causal", [False, True])
    def test_is_that_of_the_rounded_inputs_in_float32(self, causal):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(2, 3, 5, 4, generator=generator).bfloat16().requires_grad_() for _ in "qkv"
        )
        mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
        mask[1, :, :, 3:] = False
        module = nn.Module()
        module.is_causal = causal
        module.num_key_value_groups = 1
        given = None if causal else mask

        output, _ = _attention_in_float32(module, q, k, v, given, is_causal=causal)

        expected = nn.functional.scaled_dot_product_attention(
            *(t.float() for t in (q, k, v)), attn_mask=given, is_causal=causal
        )
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output, expected.transpose(1, 2).bfloat16(), rtol=0, atol=0)
        output.float().sum().backward()
        assert q.grad.dtype == torch.bfloat16

    def test_float32_alone_keeps_the_stock_one(self):
        model = SPEC.build()
        with model.computing("fp32"):
            assert model.base.config._attn_implementation == "sdpa"
        with model.computing("bf16"):
            assert model.base.config._attn_implementation != "sdpa"


class TestAuto:
    @pytest.fixture
    def processor(self, monkeypatch):
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)

        def has(**capabilities):
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)

        return has

    @pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16"])
    def test_takes_bf16_where_the_processor_multiplies_in_it(self, processor, flag):
        processor(avx512_f=True, **{flag: True})

        assert resolve_precision("auto", CPU) == "bf16"
        assert resolve_precision("fp32", CPU) == "fp32"

    def test_takes_fp32_elsewhere(self, processor):
        processor(avx512_f=True, avx512_bf16=False)

        assert resolve_precision("auto", CPU) == "fp32"
        assert resolve_precision("bf16", CPU) == "bf16"

    def test_takes_fp32_where_torch_does_not_say(self, processor, monkeypatch):
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)

        assert resolve_precision("auto", CPU) == "fp32"

    @pytest.mark.parametrize(("isa", "expected"), [("avx512_core", "fp32"), ("ALL", "bf16")])
    def test_goes_by_onednns_own_limit(self, processor, monkeypatch, isa, expected):
        processor(avx512_bf16=True)
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)

        assert resolve_precision("auto", CPU) == expected

    @pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16")])
    def test_on_cuda(self, monkeypatch, capability, expected):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

        assert resolve_precision("auto", torch.device("cuda")) == expected

    def test_a_model_computes_in_what_it_chose(self, monkeypatch):
        monkeypatch.setattr(device_module, "_multiplies_bf16", lambda device: True)
        model, rows = SPEC.build(), random_rows(5)
        model.load_whole(random_adapter(model, 2))

        chosen = predict_logits(model, rows, "auto")

        assert (chosen == predict_logits(model, rows, "bf16")).all()
        assert (chosen != predict_logits(model, rows, "fp32")).any()
