"""No gradient work below the lowest layer that trains something."""

from dataclasses import replace

import pytest
import torch
from training_factories import SPEC, plan_for, random_adapter, random_rows

from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.training.classifier import ClassifierSpec
from hafl_app.training.local import train
from hafl_app.training.settings import BaseSpec, TrainOptions

OPTIONS = TrainOptions(batch_size=4)
LOWER, UPPER = "encoder.layer.0.", "encoder.layer.1."
EMBEDDINGS = "embeddings"


def with_gradients(model, adapter, plan, options=OPTIONS):
    """Train one step; return the modules whose outputs took part in the backward pass."""
    reached = []

    def watch(name):
        def look(module, inputs, output):
            if isinstance(output, torch.Tensor) and output.requires_grad:
                reached.append(name)

        return look

    handles = [m.register_forward_hook(watch(name)) for name, m in model.base.named_modules()]
    train(model, adapter, replace(plan, max_steps=1), random_rows(6), options, seed=1)
    for handle in handles:
        handle.remove()
    return reached


def inside(reached, *parts):
    return [name for name in reached if any(part in name for part in parts)]


@pytest.fixture(params=["mean", "cls"])
def spec(request) -> ClassifierSpec:
    return replace(SPEC, base=BaseSpec("", random_weights=True, pooling=request.param))


def test_factors_in_the_lowest_layer_need_gradients_there_but_not_below(spec):
    model = spec.build()
    adapter = random_adapter(model, 3)

    reached = with_gradients(model, adapter, plan_for(adapter))

    assert inside(reached, f"{LOWER}attention.self.query")
    assert not inside(reached, EMBEDDINGS)


def test_nothing_below_target_modules_of_an_upper_layer(spec):
    targets = tuple(f"{UPPER}{name}" for name in ("intermediate.dense", "output.dense"))
    model = replace(spec, target_modules=targets).build()
    adapter = random_adapter(model, 3)

    reached = with_gradients(model, adapter, plan_for(adapter))

    assert inside(reached, f"{UPPER}intermediate")
    assert not inside(reached, LOWER, EMBEDDINGS, f"{UPPER}attention")


def test_nothing_in_lower_layers_whose_components_are_all_frozen(spec):
    model = spec.build()
    adapter = random_adapter(model, 3)
    modules = {
        name: ModulePlan((0, 1, 2), (1,) if UPPER in name else ()) for name in adapter.modules
    }

    reached = with_gradients(model, adapter, replace(plan_for(adapter), modules=modules))

    assert inside(reached, f"{UPPER}attention.self.query")
    assert not inside(reached, LOWER, EMBEDDINGS)


def test_a_head_alone_reaches_no_layer(spec):
    model = spec.build()
    adapter = random_adapter(model, 3)

    reached = with_gradients(model, adapter, plan_for(adapter, ()))

    assert not inside(reached, LOWER, UPPER, EMBEDDINGS)


def test_recomputing_activations_adds_no_layer(spec):
    model = replace(spec, target_modules=(f"{UPPER}output.dense",)).build()
    adapter = random_adapter(model, 3)

    reached = with_gradients(
        model, adapter, plan_for(adapter), replace(OPTIONS, gradient_checkpointing=True)
    )
    after = with_gradients(model, adapter, plan_for(adapter))

    assert inside(reached, f"{UPPER}output")
    assert not inside([*reached, *after], LOWER, EMBEDDINGS)
