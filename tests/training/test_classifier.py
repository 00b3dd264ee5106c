import copy

import pytest
import torch
from torch import nn
from training_factories import (
    LABELS,
    QUERY,
    SPEC,
    TINY,
    WIDE,
    assert_same_adapter,
    parameters_of,
    plan_for,
    random_adapter,
    with_module,
)

from hafl_app.lowrank.factors import Adapter, LoraFactors, ModuleShape
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.training import lora_model
from hafl_app.training.base_model import load_base
from hafl_app.training.classifier import ClassifierSpec, LoraClassifier, head_shapes
from hafl_app.training.locate import ModelError
from hafl_app.training.lora_layers import FROZEN, TRAINABLE
from hafl_app.training.lora_model import adapter_shapes, resident_model
from hafl_app.training.settings import BaseSpec
from hafl_app.training.target_modules import resolve_targets

IDS = torch.tensor([[5, 9, 2, 7], [3, 8, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


@pytest.fixture(scope="module")
def classifier() -> LoraClassifier:
    return LoraClassifier(SPEC)


@pytest.fixture(scope="module")
def base() -> tuple[nn.Module, nn.Linear]:
    """Return the base and head of ``SPEC`` without PEFT."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SPEC.seed)
        encoder = load_base(TINY, LABELS).eval()
        torch.manual_seed(SPEC.seed)  # the head follows from the seed alone
        return encoder, nn.Linear(32, LABELS)


@torch.no_grad()
def merged_logits(base, adapter: Adapter) -> torch.Tensor:
    """Return the logits with every update added to its weight by hand, row by row, unpadded."""
    encoder, head = copy.deepcopy(base)
    if adapter.head:
        head.load_state_dict(dict(adapter.head))
    for name, factors in adapter.modules.items():
        encoder.get_submodule(name).weight += factors.delta_weight()
    logits = []
    for ids, mask in zip(IDS, MASK, strict=True):
        alone = ids[mask.bool()][None]
        hidden = encoder(input_ids=alone, attention_mask=torch.ones_like(alone)).last_hidden_state
        logits.append(head(hidden[0].mean(0)))
    return torch.stack(logits)


@torch.no_grad()
def logits_of(classifier: LoraClassifier, adapter: Adapter, plan: TrainPlan) -> torch.Tensor:
    classifier.load(adapter, plan)
    return classifier.eval()(IDS, MASK)


class TestForward:
    def test_without_update_is_the_base_model(self, classifier, base):
        nothing = random_adapter(classifier, 0, head=False)

        logits = logits_of(classifier, nothing, plan_for(nothing))

        torch.testing.assert_close(logits, merged_logits(base, Adapter({})), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("trainable", [None, (), (0, 2), (3, 1)])
    @pytest.mark.parametrize("scaling", [1.0, 16 / 30, 4.0])
    def test_is_the_base_with_the_updates_merged(self, classifier, base, trainable, scaling):
        adapter = random_adapter(classifier, 4)

        logits = logits_of(classifier, adapter, plan_for(adapter, trainable, scaling=scaling))

        expected = merged_logits(base, adapter)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        without = Adapter({}, adapter.head)
        assert (expected - merged_logits(base, without)).abs().max() > 0.05  # the updates matter

    def test_modules_may_differ_in_rank_and_in_what_is_trained(self, classifier, base):
        kinds = [
            ModulePlan((5, 1, 3), (3, 5), 0.5),
            ModulePlan((0, 1), ()),
            ModulePlan((), ()),
            ModulePlan((2, 0, 7, 4), (2, 0, 7, 4), 2.0),
            ModulePlan((0, 1, 2), (2, 0), 2.0, factors="A"),
            ModulePlan((4, 1), (1,), 0.5, factors="B"),
            ModulePlan((), (), factors="B"),
        ]
        modules = {name: kinds[i % 7] for i, name in enumerate(classifier.layers)}
        adapter = random_adapter(classifier, lambda name: len(modules[name].held))

        logits = logits_of(classifier, adapter, TrainPlan(modules))

        torch.testing.assert_close(logits, merged_logits(base, adapter), rtol=0, atol=1e-4)
        trained = classifier.trained(TrainPlan(modules)).modules
        for name, module in modules.items():
            chosen = adapter.modules[name].select(module.trainable_slots).only(module.factors)
            assert torch.equal(trained[name].lora_A, chosen.lora_A)
            assert torch.equal(trained[name].lora_B, chosen.lora_B)
        for name, (lora_A, lora_B) in classifier.trainable_factors().items():
            assert lora_A.requires_grad == modules[name].trains_A
            assert lora_B.requires_grad == modules[name].trains_B
        assert set(classifier.trainable_factors()) == {n for n, m in modules.items() if m.trainable}

    def test_padding_does_not_count(self, classifier):
        adapter = random_adapter(classifier, 2)
        padded = logits_of(classifier, adapter, plan_for(adapter))

        with torch.no_grad():
            alone = classifier(IDS[1:, :2], MASK[1:, :2])

        torch.testing.assert_close(padded[1:], alone, rtol=0, atol=1e-5)


class TestSwapping:
    def test_rebuilds_nothing(self, classifier):
        first = random_adapter(classifier, 3)
        before = logits_of(classifier, first, plan_for(first, (0,)))
        modules = {name: id(module) for name, module in classifier.named_modules()}
        weights = {
            name: id(layer.base_layer.weight)  # type: ignore[union-attr]
            for name, layer in classifier.layers.items()
        }

        for rank in (8, 0, 1):
            other = random_adapter(classifier, rank, seed=rank + 1)
            assert not torch.equal(logits_of(classifier, other, plan_for(other)), before)

        assert {name: id(module) for name, module in classifier.named_modules()} == modules
        assert {n: id(layer.base_layer.weight) for n, layer in classifier.layers.items()} == weights
        assert torch.equal(logits_of(classifier, first, plan_for(first, (0,))), before)

    def test_a_process_loads_the_base_once(self, monkeypatch):
        calls = []
        monkeypatch.setattr(lora_model, "load_base", lambda *a: calls.append(a) or load_base(*a))
        resident_model.cache_clear()

        for rank in (1, 4):
            resident = resident_model(ClassifierSpec(TINY, LABELS, seed=7))
            resident.load_whole(random_adapter(resident, rank))

        resident_model.cache_clear()
        assert calls == [(TINY, LABELS)]

    def test_leaves_the_adapter_alone(self, classifier):
        adapter, untouched = (random_adapter(classifier, 3) for _ in range(2))
        classifier.load(adapter, plan_for(adapter))

        with torch.no_grad():
            for pair in classifier.trainable_factors().values():
                for parameter in pair:
                    parameter.zero_()
            for parameter in classifier.head_module.parameters():
                parameter.zero_()

        assert_same_adapter(adapter, untouched)

    def test_an_empty_head_restores_the_initial_one(self, classifier):
        adapter = random_adapter(classifier, 2)
        classifier.load(adapter, plan_for(adapter))
        assert torch.equal(classifier.head_state()["weight"], adapter.head["weight"])

        classifier.load(adapter.with_head({}), plan_for(adapter))

        fresh = LoraClassifier(SPEC).head_state()
        assert {k: tuple(v.shape) for k, v in fresh.items()} == {"weight": (3, 32), "bias": (3,)}
        assert head_shapes(classifier) == {"weight": (3, 32), "bias": (3,)}
        for name, tensor in classifier.head_state().items():
            assert torch.equal(tensor, fresh[name])

    def test_gradients_flow_to_the_trainable_only(self, classifier):
        adapter = random_adapter(classifier, 4)
        classifier.load(adapter, plan_for(adapter, (1, 2), head="frozen"))

        classifier(IDS, MASK).sum().backward()

        wanted = {id(p) for pair in classifier.trainable_factors().values() for p in pair}
        assert {id(p) for p in classifier.parameters() if p.requires_grad} == wanted
        assert {id(p) for p in classifier.parameters() if p.grad is not None} == wanted


class TestScaling:
    @pytest.mark.parametrize("scaling", [0.25, 1.0, 8.0])
    def test_a_power_of_two_comes_back_to_the_bit(self, classifier, scaling):
        adapter = random_adapter(classifier, 3)
        plan = plan_for(adapter, scaling=scaling)
        classifier.load(adapter, plan)

        assert_same_adapter(classifier.trained(plan), adapter)

    def test_any_other_comes_back_to_rounding(self, classifier):
        adapter = random_adapter(classifier, 3)
        plan = plan_for(adapter, scaling=16 / 30)
        classifier.load(adapter, plan)

        for name, factors in classifier.trained(plan).modules.items():
            assert torch.equal(factors.lora_A, adapter.modules[name].lora_A)
            torch.testing.assert_close(
                factors.lora_B, adapter.modules[name].lora_B, rtol=1e-6, atol=0
            )

    @pytest.mark.parametrize("part", [TRAINABLE, FROZEN])
    def test_is_unfolded_from_lora_b_inside(self, classifier, part):
        adapter = random_adapter(classifier, 3)
        plan = plan_for(adapter, None if part == TRAINABLE else (), scaling=4.0)
        classifier.load(adapter, plan)

        inside = parameters_of(classifier, part)[WIDE]

        assert torch.equal(inside[0], adapter.modules[WIDE].lora_A)
        assert torch.equal(inside[1] * 4, adapter.modules[WIDE].lora_B)


class TestRefusals:
    @pytest.fixture
    def adapter(self, classifier):
        return random_adapter(classifier, 2)

    def test_a_missing_module(self, classifier, adapter):
        plan = plan_for(adapter)
        modules = {n: f for n, f in adapter.modules.items() if n != WIDE}
        plans = {n: m for n, m in plan.modules.items() if n != QUERY}

        with pytest.raises(ValueError, match=f"module '{WIDE}' is missing"):
            classifier.load(Adapter(modules), plan)
        with pytest.raises(ValueError, match=f"module '{QUERY}' is missing"):
            classifier.load(adapter, TrainPlan(plans))

    def test_a_module_that_is_not_adapted(self, classifier, adapter):
        odd = with_module(adapter, "encoder.layer.9", adapter.modules[QUERY])

        with pytest.raises(ValueError, match=r"module 'encoder\.layer\.9' is none"):
            classifier.load(odd, plan_for(adapter))

    def test_transposed_factors(self, classifier, adapter):
        factors = adapter.modules[WIDE]
        odd = with_module(adapter, WIDE, LoraFactors(factors.lora_B.T, factors.lora_A.T))

        with pytest.raises(ValueError, match=rf"module '{WIDE}'.*\(32, 48\).*layer of \(48, 32\)"):
            classifier.load(odd, plan_for(adapter))

    def test_another_rank_than_planned(self, classifier, adapter):
        odd = with_module(adapter, WIDE, adapter.modules[WIDE].select((0,)))

        with pytest.raises(ValueError, match=f"module '{WIDE}': rank 1, the plan holds 2"):
            classifier.load(odd, plan_for(adapter))


class TestTargets:
    def test_all_linear_leaves_out_the_head(self, classifier):
        # six linear layers in each of two transformer layers
        assert len(classifier.layers) == 12
        assert classifier.shapes()[WIDE] == ModuleShape(out_features=48, in_features=32)
        assert classifier.shapes()[WIDE.replace("intermediate", "output")] == ModuleShape(32, 48)

    def test_by_ending(self):
        targets = ("attention.self.query", "0.intermediate.dense")

        layers = LoraClassifier(ClassifierSpec(TINY, LABELS, targets)).layers

        assert set(layers) == {QUERY, QUERY.replace("0", "1"), WIDE.replace("1", "0")}

    @pytest.mark.parametrize("pooling", ["mean", "cls"])
    @pytest.mark.parametrize("targets", ["all-linear", ("query", "0.intermediate.dense")])
    def test_shapes_are_known_without_the_weights(self, pooling, targets):
        base = BaseSpec("", random_weights=True, pooling=pooling)
        spec = ClassifierSpec(base, LABELS, targets)

        assert adapter_shapes(spec) == LoraClassifier(spec).shapes()

    def test_an_ending_ends_at_a_dot(self, base):
        with pytest.raises(ModelError, match="'uery'"):
            resolve_targets(base[0], "uery", base[1])

    def test_an_unknown_name_gets_the_known_ones(self):
        with pytest.raises(ModelError, match=r"'q_proj'; there are dense, key, query, value, or"):
            LoraClassifier(ClassifierSpec(TINY, LABELS, ("q_proj",)))

    def test_the_models_own_head_and_pooler_are_not_adapted(self):
        base = BaseSpec("", random_weights=True, pooling="cls")

        classifier = LoraClassifier(ClassifierSpec(base, LABELS))

        assert len(classifier.layers) == 12
        assert set(classifier.layers) == {f"bert.{n}" for n in LoraClassifier(SPEC).layers}
        assert classifier.head_module is classifier.base.classifier
        assert classifier(IDS, MASK).shape == (2, LABELS)
