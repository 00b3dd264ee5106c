"""The fused LoRA layer against PEFT's own, by value, by gradient and by amount of work."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from training_factories import SPEC, plan_for, random_adapter

from hafl_app.training.classifier import LoraClassifier
from hafl_app.training.fused_lora import FusedLoraLinear, fuse

IN, OUT, ROWS = 5, 7, 3
TRAINED, FROZEN = 2, 4  # components


def lora_layer(active, *, bias=True, dropout=0.0, dtype=torch.float64, scaling=1.5):
    """Return a fused layer with two adapters of which some take part, the second frozen."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"dense": nn.Linear(IN, OUT, bias=bias, dtype=dtype)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, rank in (("trained", TRAINED), ("frozen", FROZEN)):
            config = LoraConfig(r=rank, target_modules=["dense"], lora_dropout=dropout)
            inject_adapter_in_model(config, model, adapter_name=name)
    layer = model["dense"].to(dtype).requires_grad_(False)
    for name in ("trained", "frozen"):
        nn.init.normal_(layer.lora_B[name].weight)
        layer.scaling[name] = scaling
    layer.set_adapter(active)
    layer.lora_A["frozen"].weight.requires_grad_(False)
    layer.lora_B["frozen"].weight.requires_grad_(False)
    fuse(model)
    assert type(layer) is FusedLoraLinear
    return layer


def inputs(*shape, dtype=torch.float64, needs_grad=True):
    values = torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return values.requires_grad_(needs_grad)


def results(layer, forward, x):
    """Return the output, and the gradients of a loss by name; None where there is none."""
    layer.zero_grad()
    x.grad = None
    torch.manual_seed(3)  # of dropout
    output = forward(layer, x)
    if output.requires_grad:
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        (output.float() * weights).sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return output.detach(), {**gradients, "x": x.grad}


def assert_same(layer, x, **tolerance):
    output, gradients = results(layer, FusedLoraLinear.forward, x)
    expected, wanted = results(layer, Linear.forward, x)

    torch.testing.assert_close(output, expected, **tolerance)
    for name, gradient in wanted.items():
        assert (gradient is None) == (gradients[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradients[name], gradient, msg=name, **tolerance)
    return output, gradients


class TestResult:
    @pytest.mark.parametrize("active", [["trained"], ["frozen"], ["trained", "frozen"], []])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("shape", [(ROWS,), (2, ROWS)])
    def test_values_and_gradients_are_pefts(self, active, bias, shape):
        _, gradients = assert_same(lora_layer(active, bias=bias), inputs(*shape))

        assert gradients["lora_A.frozen.weight"] is None
        assert (gradients["lora_A.trained.weight"] is None) == ("trained" not in active)

    def test_inputs_that_need_no_gradient_get_none(self):
        _, gradients = assert_same(
            lora_layer(["trained", "frozen"]), inputs(ROWS, needs_grad=False)
        )

        assert gradients["x"] is None
        assert gradients["lora_B.trained.weight"] is not None

    @pytest.mark.parametrize("active", [["trained"], ["trained", "frozen"]])
    @pytest.mark.parametrize("stays", ["lora_A", "lora_B"])
    @pytest.mark.parametrize("needs_grad", [True, False])
    def test_a_factor_alone_is_trained_as_by_peft(self, active, stays, needs_grad):
        layer = lora_layer(active)
        getattr(layer, stays)["trained"].weight.requires_grad_(False)

        _, gradients = assert_same(layer, inputs(2, ROWS, needs_grad=needs_grad))

        got = [name for name, gradient in gradients.items() if gradient is not None]
        moves = {"lora_A": "lora_B", "lora_B": "lora_A"}[stays]
        assert got == [f"{moves}.trained.weight"] + ["x"] * needs_grad

    def test_scaling_counts(self):
        layer, x = lora_layer(["trained", "frozen"], scaling=1.0), inputs(ROWS)
        before = layer(x)
        layer.scaling = dict.fromkeys(layer.scaling, 2.0)

        update = before - layer.base_layer(x)
        torch.testing.assert_close(layer(x) - layer.base_layer(x), 2 * update)

    def test_bf16_autocast_rounds_as_peft_does(self):
        layer, x = lora_layer(["trained", "frozen"], dtype=torch.float32), inputs(2, ROWS).float()
        x = x.detach().requires_grad_()

        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, gradients = assert_same(layer, x, rtol=0.02, atol=0.03)

        assert output.dtype == torch.bfloat16
        assert gradients["lora_A.trained.weight"].dtype == torch.float32

    def test_a_bf16_base_under_fp32_factors_is_left_to_peft(self):
        layer = lora_layer(["trained"], dtype=torch.float32)
        layer.base_layer.bfloat16()

        output, _ = assert_same(layer, inputs(ROWS, dtype=torch.bfloat16), rtol=0, atol=0)

        assert output.dtype == torch.bfloat16

    def test_dropout_draws_as_peft_does(self):
        layer, x = lora_layer(["trained", "frozen"], dropout=0.5), inputs(2, ROWS)

        dropped, _ = assert_same(layer.train(), x, rtol=0, atol=0)

        assert not torch.allclose(dropped, layer.eval()(x))
        assert_same(layer.eval(), x)

    def test_a_merged_layer_computes_as_before(self):
        layer, x = lora_layer(["trained", "frozen"]), inputs(ROWS)
        before = layer(x)

        layer.merge()

        torch.testing.assert_close(layer(x), before)

    def test_a_copy_has_factors_of_its_own(self):
        layer, x = lora_layer(["trained"]), inputs(ROWS)
        other = copy.deepcopy(layer)
        nn.init.zeros_(other.lora_B["trained"].weight)

        torch.testing.assert_close(other(x), layer.base_layer(x))
        assert not torch.allclose(layer(x), layer.base_layer(x))


def test_other_kinds_of_layers_stay_pefts():
    class Quantized(nn.Linear):
        pass

    model = nn.ModuleDict({"odd": Quantized(IN, OUT), "words": nn.Embedding(11, IN)})
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["odd", "words"]), model)

    fuse(model)

    assert not any(isinstance(module, FusedLoraLinear) for module in model.modules())


def products(layer, x):
    """Return multiplications of a forward and backward pass over ``x``, without the base's own."""

    def product(_, left, right, **options):  # in place, which torch does not count
        return 2 * left[0] * left[1] * right[1]

    in_place = {torch.ops.aten.addmm_: product}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        layer(x).sum().backward()
    base = 2 if x.requires_grad else 1
    return counter.get_total_flops() / 2 - base * x.shape[0] * IN * OUT


class TestWork:
    def test_frozen_components_cost_a_forward_pass_and_the_inputs_gradient(self):
        one = ROWS * (IN + OUT)  # a component forward, or its share of dx, or of dA and dB

        assert products(lora_layer(["trained"]), inputs(ROWS)) == 3 * TRAINED * one
        assert (
            products(lora_layer(["trained", "frozen"]), inputs(ROWS))
            == (3 * TRAINED + 2 * FROZEN) * one
        )

    def test_the_lowest_layers_frozen_components_cost_a_forward_pass(self):
        layer, x = lora_layer(["trained", "frozen"]), inputs(ROWS, needs_grad=False)
        backward = ROWS * TRAINED * (OUT + IN + OUT)  # dy B and with it dA, and dB; no dx

        assert products(layer, x) == ROWS * (TRAINED + FROZEN) * (IN + OUT) + backward

    @pytest.mark.parametrize(("stays", "left"), [("lora_A", OUT), ("lora_B", OUT + IN)])
    def test_a_factor_that_is_not_trained_costs_no_product_of_its_own(self, stays, left):
        layer, x = lora_layer(["trained", "frozen"]), inputs(ROWS, needs_grad=False)
        getattr(layer, stays)["trained"].weight.requires_grad_(False)

        # d(s B) alone, or dy B and with it dA.
        forward = ROWS * (TRAINED + FROZEN) * (IN + OUT)
        assert products(layer, x) == forward + ROWS * TRAINED * left

    @pytest.mark.parametrize(
        ("stays", "kept"),
        # The inputs for dA, the trained components' inner products for d(s B).
        [
            (None, [(ROWS, IN), (ROWS, TRAINED)]),
            ("lora_A", [(ROWS, TRAINED)]),
            ("lora_B", [(ROWS, IN)]),
        ],
    )
    def test_activations_are_kept_for_what_is_trained_alone(self, stays, kept):
        layer, x = lora_layer(["trained", "frozen"]), inputs(ROWS)
        if stays:
            getattr(layer, stays)["trained"].weight.requires_grad_(False)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(tuple(t.shape)) or t, lambda t: t
        ):
            layer(x)

        assert sorted(shape for shape in saved if shape[:1] == (ROWS,)) == sorted(kept)

    def test_every_adapted_layer_of_a_model_is_fused(self):
        classifier = LoraClassifier(SPEC)
        adapter = random_adapter(classifier, 3)
        classifier.load(adapter, plan_for(adapter, (1,)))

        assert classifier.layers
        assert {type(layer) for layer in classifier.layers.values()} == {FusedLoraLinear}
