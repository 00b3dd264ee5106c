"""Clients that train together in one model: the same results as one at a time."""

from dataclasses import replace

import pytest
import torch
from causal_factories import CAUSAL, random_pairs
from training_factories import SPEC, plan_for, random_adapter, random_rows
from vision_factories import SPEC as IMAGES
from vision_factories import random_images

from hafl_app.plan import TailPruning
from hafl_app.training import cohort
from hafl_app.training.cohort import train_cohort
from hafl_app.training.local import Task, train
from hafl_app.training.lora_model import LoraModel
from hafl_app.training.settings import TrainOptions

OPTIONS = TrainOptions(batch_size=4, learning_rate=1e-2, max_grad_norm=0.5)
KINDS = {
    "encoder": (SPEC, random_rows),
    "causal": (CAUSAL, random_pairs),
    "vision": (IMAGES, random_images),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """Return a model of every kind without dropout, and what makes its rows."""
    spec, rows = KINDS[request.param]
    return without_dropout(spec.build()), rows


@pytest.fixture(scope="module")
def classifier():
    return without_dropout(SPEC.build())


def without_dropout(model: LoraModel) -> LoraModel:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in cohort.dropout_rates(model.base.config):
        setattr(model.base.config, name, 0.0)
    return model


def mixed_tasks(model: LoraModel, rows, options: TrainOptions = OPTIONS) -> list[Task]:
    """Return clients of different ranks, scalings, data and steps, some with frozen components."""
    whole = random_adapter(model, 3, seed=1)
    few = random_adapter(model, lambda name: 1 + len(name) % 2, seed=2)
    wide = random_adapter(model, 5, seed=3)
    plans = (
        (whole, plan_for(whole, max_steps=5, importance="adalora")),
        (few, plan_for(few, max_steps=2, scaling=2.0, importance="sensitivity")),
        (wide, plan_for(wide, (4, 1), local_epochs=2, importance="smoothed", scaling=0.5)),
        (wide, plan_for(wide, (2,), head="frozen", importance="adalora", probe_batches=2)),
        (whole, plan_for(whole, local_epochs=3, max_steps=5, tail=TailPruning(0.5, 0.1, 1))),
    )
    # Last batches are of one row and of three; a batch goes with others of as many rows.
    numbers = (21, 9, 8, 7, 5)
    return [
        Task(adapter, plan, rows(number, seed=number), options, seed=number)
        for (adapter, plan), number in zip(plans, numbers, strict=True)
    ]


def wide_pixels(task: Task) -> Task:
    """Return a task with images in float64, which texts are not."""
    if not hasattr(task.examples, "pixels"):
        return task
    images = replace(task.examples, pixels=task.examples.pixels.astype("float64"))
    return replace(task, examples=images)


def alone(model: LoraModel, task: Task):
    return train(model, task.adapter, task.plan, task.examples, task.options, task.seed)


def assert_same(joint, single, rtol: float, atol: float) -> None:
    close = {"rtol": rtol, "atol": atol}
    assert (joint.steps, joint.num_examples) == (single.steps, single.num_examples)
    assert joint.micro_batch_size == single.micro_batch_size
    assert joint.loss == pytest.approx(single.loss, rel=rtol, abs=atol)
    assert list(joint.adapter.modules) == list(single.adapter.modules)
    for name, factors in single.adapter.modules.items():
        torch.testing.assert_close(joint.adapter.modules[name].lora_A, factors.lora_A, **close)
        torch.testing.assert_close(joint.adapter.modules[name].lora_B, factors.lora_B, **close)
    assert list(joint.adapter.head) == list(single.adapter.head)
    for name, tensor in single.adapter.head.items():
        torch.testing.assert_close(joint.adapter.head[name], tensor, **close)
    assert list(joint.importance) == list(single.importance)
    for name, scores in single.importance.items():
        # Scores are float32, whatever the factors are.
        torch.testing.assert_close(joint.importance[name], scores, rtol=1e-3, atol=1e-7)


class TestSameAsAlone:
    def test_in_float64(self, kind):
        model, rows = kind
        model.double()
        tasks = [wide_pixels(task) for task in mixed_tasks(model, rows)]
        try:
            joint = train_cohort(model, tasks)
            for task, result in zip(tasks, joint, strict=True):
                assert_same(result, alone(model, task), rtol=0, atol=1e-9)
        finally:
            model.float()

    def test_in_float32(self, kind):
        model, rows = kind
        # Adam divides a gradient by its own size, however close to rounding that is.
        tasks = mixed_tasks(model, rows, replace(OPTIONS, learning_rate=1e-3))

        for task, result in zip(tasks, train_cohort(model, tasks), strict=True):
            assert_same(result, alone(model, task), rtol=1e-4, atol=1e-4)
