"""Quantized base models: what their weights, losses, gradients and bytes are."""

import copy
import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from causal_factories import CAUSAL, random_pairs
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from training_factories import CPU, SPEC, plan_for, random_adapter, random_rows

from hafl_app import packages
from hafl_app.training.base_model import load_base
from hafl_app.training.fused_lora import FusedLoraLinear
from hafl_app.training.local import train
from hafl_app.training.locate import ModelError
from hafl_app.training.lora_layers import FROZEN
from hafl_app.training.lora_model import with_quantization
from hafl_app.training.quantization.blocks import block_bytes, dequantize, precisions_of
from hafl_app.training.quantization.linear import QuantizedLinear, packed, packed_bytes
from hafl_app.training.quantization.precisions import PRECISIONS, QuantizationError
from hafl_app.training.settings import BaseSpec, TrainOptions
from hafl_app.training.step_memory import LiveBytes, count_step

LIBRARY = importlib.util.find_spec("bitsandbytes") is not None
needs_library = pytest.mark.skipif(not LIBRARY, reason="needs bitsandbytes (extra 'quantized')")
EVERY = [pytest.param(name, marks=needs_library if name != "bf16" else ()) for name in PRECISIONS]
# Rounding errors over the weights' norm: of bf16 2^-8 at most, of the others as measured on normal
# numbers (nf4 0.09, int8 0.004 to 0.007), with room.
ERRORS = {"nf4": 0.12, "int8": 0.01, "bf16": 2**-8}
OUT, IN, ROWS = 7, 48, 3
TEXTS = {"classifier": (SPEC, random_rows(9)), "causal": (CAUSAL, random_pairs(9))}


def weight(out_features=OUT, in_features=IN, seed=0):
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


def layer_of(precision, dense, *, bias=True):
    layer = QuantizedLinear(dense.shape[1], dense.shape[0], precision, bias=bias)
    layer.pack(dense)
    if bias:
        layer.bias = nn.Parameter(torch.linspace(-1, 1, dense.shape[0]), requires_grad=False)
    return layer


class TestQuantizedLinear:
    @pytest.mark.parametrize("precision", EVERY)
    # Rows of 16, 48 and 80 numbers are those that bitsandbytes 0.50.2 itself unpacks wrongly on
    # CPUs with AVX-512; 33 and 7 fill no byte or block.
    @pytest.mark.parametrize("shape", [(7, 48), (12, 16), (5, 80), (3, 33), (1, 7), (96, 64)])
    def test_rounding_errors_are_small(self, precision, shape):
        dense = weight(*shape)
        rounded = layer_of(precision, dense).dense(torch.float32)

        assert rounded.shape == dense.shape
        assert 0 < (rounded - dense).norm() / dense.norm() < ERRORS[precision]

    @needs_library
    def test_nf4_takes_the_nearest_of_sixteen_values(self):
        dense = weight(4, 64)  # a row a block
        rounded = layer_of("nf4", dense).dense(torch.float32)
        # QLoRA, appendix E
        below = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004]
        above = [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
        values = torch.tensor([*below, 0.0, *above])
        scales = dense.abs().amax(1, keepdim=True)
        nearest = (dense / scales).unsqueeze(-1).sub(values).abs().argmin(-1)

        torch.testing.assert_close(rounded, values[nearest] * scales)

    @needs_library
    def test_int8_has_a_scale_for_every_row(self):
        dense = weight() * torch.logspace(-3, 3, OUT).unsqueeze(1)
        step = dense.abs().amax(1, keepdim=True) / 127

        torch.testing.assert_close(
            layer_of("int8", dense).dense(torch.float32), (dense / step).round() * step
        )

    @pytest.mark.parametrize("precision", EVERY)
    def test_a_row_of_zeros_stays_one(self, precision):
        dense = weight(3, 64)
        dense[1] = 0

        assert layer_of(precision, dense).dense(torch.float32)[1].eq(0).all()

    @pytest.mark.parametrize("precision", EVERY)
    @pytest.mark.parametrize("bias", [True, False])
    def test_computes_as_a_plain_layer_with_the_rounded_weight(self, precision, bias):
        layer = layer_of(precision, weight(), bias=bias)
        x = torch.randn(2, ROWS, IN, generator=torch.Generator().manual_seed(1)).requires_grad_()
        plain = copy.deepcopy(x.detach()).requires_grad_()

        output = layer(x)
        expected = nn.functional.linear(plain, layer.dense(torch.float32), layer.bias)
        output.square().sum().backward()
        expected.square().sum().backward()

        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(x.grad, plain.grad)

    @pytest.mark.parametrize("precision", EVERY)
    def test_autocast_computes_in_bf16(self, precision):
        layer, x = layer_of(precision, weight()), torch.randn(ROWS, IN, requires_grad=True)

        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(x)
        output.sum().backward()

        assert output.dtype == torch.bfloat16
        assert x.grad.dtype == torch.float32
        torch.testing.assert_close(output.float(), layer(x), rtol=0.05, atol=0.2)

    @pytest.mark.parametrize("precision", EVERY)
    def test_takes_the_bytes_that_are_said(self, precision):
        layer = layer_of(precision, weight(), bias=False)

        assert packed_bytes(OUT, IN, precision) == sum(
            p.numel() * p.element_size() for p in layer.parameters()
        )
        assert packed_bytes(OUT, IN, precision) < 0.51 * 4 * OUT * IN

    @pytest.mark.parametrize("precision", EVERY)
    def test_keeps_no_dense_weight_for_the_way_back(self, precision):
        dense = weight(96, 160)
        layer, x = layer_of(precision, dense), torch.randn(2, 160, requires_grad=True)

        with LiveBytes() as live:
            output = layer(x)

        assert output.requires_grad
        assert live.peak >= 4 * dense.numel() or precision == "int8"
        assert live.live < 4 * dense.numel()

    def test_a_missing_library_is_named(self, monkeypatch):
        monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)

        with pytest.raises(ModelError, match=r"pip install .*bitsandbytes") as caught:
            with_quantization(SPEC, "nf4").build()
        assert "\n" not in str(caught.value)
        QuantizedLinear(IN, OUT, "bf16")


def models(task, quantization):
    """Return a quantized model, and one in float32 that has its rounded weights."""
    spec, rows = TEXTS[task]
    quantized = with_quantization(spec, quantization).build().eval()
    rounded = spec.build().eval()
    for name, layer in quantized.base.named_modules():
        if isinstance(layer, QuantizedLinear):
            same = rounded.base.get_submodule(name)
            same.weight = nn.Parameter(layer.dense(torch.float32), requires_grad=False)
    return quantized, rounded, rows


def loss_and_gradients(model, adapter, plan, rows):
    model.load(adapter, plan)
    loss = model.loss(model.batch(rows, np.arange(9)))
    model.zero_grad()
    loss.backward()
    return loss.item(), {
        f"{name}.{kind}": parameter.grad
        for name, pair in model.trainable_factors().items()
        for kind, parameter in zip("AB", pair, strict=True)
    }


@pytest.mark.parametrize("task", TEXTS)
@pytest.mark.slow
class TestModel:
    @pytest.mark.parametrize(
        "precision", [*EVERY, pytest.param("nf4,bf16", marks=needs_library, id="blocks differ")]
    )
    def test_losses_and_gradients_are_those_of_the_rounded_weights(self, task, precision):
        quantized, rounded, rows = models(task, precision)
        adapter = random_adapter(quantized, 5)
        plan = plan_for(adapter, (1, 3), scaling=1.5)

        loss, gradients = loss_and_gradients(quantized, adapter, plan, rows)
        expected, wanted = loss_and_gradients(rounded, adapter, plan, rows)

        assert loss == pytest.approx(expected, rel=1e-6)
        assert gradients.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)

    @pytest.mark.parametrize("precision", EVERY)
    def test_frozen_components_count_and_stay(self, task, precision):
        quantized, _, rows = models(task, precision)
        adapter = random_adapter(quantized, 5)
        plan, everything = plan_for(adapter, (1, 3)), plan_for(adapter)

        loss, gradients = loss_and_gradients(quantized, adapter, plan, rows)
        whole, _ = loss_and_gradients(quantized, adapter, everything, rows)
        quantized.load(adapter, plan)

        assert loss == pytest.approx(whole, rel=1e-5)
        assert all(g.shape[0] == 2 or g.shape[1] == 2 for g in gradients.values())
        frozen = [layer.lora_A[FROZEN].weight for layer in quantized.layers.values()]
        assert not any(p.requires_grad for p in frozen)
        trained = quantized.trained(plan)
        for name, factors in adapter.modules.items():
            torch.testing.assert_close(trained.modules[name].lora_A, factors.lora_A[[1, 3]])
            torch.testing.assert_close(trained.modules[name].lora_B, factors.lora_B[:, [1, 3]])

    @pytest.mark.parametrize("precision", EVERY)
    def test_training_learns_and_leaves_the_base_as_it_is(self, task, precision):
        spec, rows = TEXTS[task]
        model = with_quantization(spec, precision).build()
        base = {k: v.clone() for k, v in model.base.state_dict().items() if "lora" not in k}
        adapter = random_adapter(model, 3)
        plan = plan_for(adapter, local_epochs=12)
        options = TrainOptions(batch_size=9, learning_rate=3e-2)

        before = train(model, adapter, replace(plan, local_epochs=1), rows, options, 1).loss
        assert train(model, adapter, plan, rows, options, 1).loss < 0.98 * before

        for name, tensor in base.items():
            if not name.startswith("classifier"):
                assert torch.equal(model.base.state_dict()[name], tensor), name

    @pytest.mark.parametrize("precision", EVERY)
    def test_the_fused_layer_computes_as_pefts_own(self, task, precision):
        quantized, _, rows = models(task, precision)
        adapter = random_adapter(quantized, 5)
        plan = plan_for(adapter, (0, 4), scaling=2.0)
        loss, gradients = loss_and_gradients(quantized, adapter, plan, rows)

        for layer in quantized.layers.values():
            assert type(layer) is FusedLoraLinear
            layer.__class__ = PeftLinear
        expected, wanted = loss_and_gradients(quantized, adapter, plan, rows)

        assert loss == pytest.approx(expected, rel=1e-5)
        for name, gradient in wanted.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)

    @pytest.mark.parametrize("precision", EVERY)
    def test_layers_without_factors_are_quantized_too(self, task, precision):
        spec, _ = TEXTS[task]
        some = replace(spec, target_modules=("query",) if task == "classifier" else ("q_proj",))
        every = with_quantization(spec, precision).build()
        model = with_quantization(some, precision).build()

        assert model.shapes().keys() < every.shapes().keys()
        assert frozen_bytes(model) == frozen_bytes(every)

    def test_shapes_are_those_of_the_dense_weights(self, task):
        spec, _ = TEXTS[task]

        assert with_quantization(spec, "bf16").build().shapes() == spec.build().shapes()

    @needs_library
    def test_shapes_of_packed_weights_too(self, task):
        spec, _ = TEXTS[task]

        assert with_quantization(spec, "nf4").build().shapes() == spec.build().shapes()

    @pytest.mark.parametrize("precision", EVERY)
    def test_memory_is_counted_with_the_bytes_that_there_are(self, task, precision):
        spec, rows = TEXTS[task]
        spec, options = with_quantization(spec, precision), TrainOptions(batch_size=9)
        model = spec.build()
        adapter = random_adapter(model, 4)
        longest = int(np.diff(rows.offsets).max())

        counted = count_step(spec, 2, 4, options, longest, CPU)
        plain = count_step(TEXTS[task][0], 2, 4, options, longest, CPU)
        with LiveBytes() as live:
            train(
                model, adapter, plan_for(adapter, (0, 1), importance="smoothed"), rows, options, 1
            )

        assert counted.weights == frozen_bytes(with_quantization(spec, precision).build())
        assert counted.weights < plain.weights
        assert counted.peak - counted.weights == pytest.approx(live.peak, rel=0.25)

    @pytest.mark.parametrize("precision", EVERY)
    def test_dequantizing_gives_the_rounded_weights(self, task, precision):
        spec, _ = TEXTS[task]
        base = load_base(replace(spec.base, quantization=precision), 3)
        rounded = {
            n: m.dense(torch.float32)
            for n, m in base.named_modules()
            if isinstance(m, QuantizedLinear)
        }

        dequantize(base)

        assert rounded
        for name, dense in rounded.items():
            assert type(base.get_submodule(name)) is nn.Linear
            assert torch.equal(base.get_submodule(name).weight, dense)


def frozen_bytes(model):
    parameters = [p for n, p in model.base.named_parameters() if "lora" not in n]
    heads = {id(p) for p in model.head_module.parameters()}
    return sum(p.numel() * p.element_size() for p in parameters if id(p) not in heads)


class TestFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        load_base(CAUSAL.base, 0).bfloat16().save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize("precision", EVERY)
    def test_weights_of_files_are_packed_as_those_in_memory(self, folder, precision):
        spec = BaseSpec(str(folder), task="causal_lm")
        plain = load_base(spec, 0)

        read = load_base(replace(spec, quantization=precision), 0)

        layers = [(n, m) for n, m in read.named_modules() if isinstance(m, QuantizedLinear)]
        assert len(layers) == 14  # seven in each of two blocks
        for name, layer in layers:
            expected, scales = packed(plain.get_submodule(name).weight, precision)
            assert torch.equal(layer.weight, expected)
            assert scales is None or torch.equal(layer.scales, scales)
        assert not any(p.requires_grad for p in read.parameters())
        assert torch.equal(read.lm_head.weight, plain.lm_head.weight)

    def test_quantized_files_are_refused(self, folder):
        config = folder / "config.json"
        text = config.read_text()
        config.write_text(text.replace("{", '{"quantization_config": {"load_in_4bit": true},', 1))

        with pytest.raises(ModelError, match="quantized already"):
            load_base(BaseSpec(str(folder), task="causal_lm"), 0)


class TestPrecisions:
    def test_one_is_for_all_blocks(self):
        assert precisions_of("int8", 3) == ("int8", "int8", "int8")
        assert precisions_of("nf4,bf16,int8", 3) == ("nf4", "bf16", "int8")

    @pytest.mark.parametrize("wrong", ["nf4,int8", "int3", "nf4,none,int8", ""])
    def test_others_are_refused(self, wrong):
        with pytest.raises(QuantizationError, match=r"model\.quantization"):
            precisions_of(wrong, 3)

    @needs_library
    def test_block_bytes_are_those_of_the_packed_weights(self):
        for precision in PRECISIONS:
            base = load_base(replace(CAUSAL.base, quantization=precision), 0)
            layers = [m for m in base.modules() if isinstance(m, QuantizedLinear)]
            taken = sum(p.numel() * p.element_size() for m in layers for p in m.parameters())

            assert sum(sizes[precision] for sizes in block_bytes(base)) == taken
