"""Counted operations against torch's own counter around real steps and whole trainings."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from causal_factories import CAUSAL, random_pairs
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_factories import QUERY, SPEC, WIDE, plan_for, random_adapter, random_rows
from vision_factories import SPEC as IMAGES
from vision_factories import random_images

from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.component_choice import ComponentChoice
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.training.causal import CausalSpec
from hafl_app.training.cohort import train_cohort
from hafl_app.training.flops import FlopCounter, RowFlops, row_flops
from hafl_app.training.local import train
from hafl_app.training.settings import TrainOptions
from hafl_app.training.task import Task

ROWS = random_rows(13)
OPTIONS = TrainOptions(batch_size=5)
row_of = cache(row_flops)  # a count takes a second, and is of the model alone


def counted_step(model, rows, length):
    with sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
        model.loss(model.blank_batch(rows, length)).backward()
    return counter.get_total_flops()


def loaded(spec, rank, trainable=None, **settings):
    model = spec.build()
    adapter = random_adapter(model, rank)
    plan = plan_for(adapter, trainable, **settings)
    model.load(adapter, plan)
    return model.train(), plan


@pytest.mark.parametrize("spec", [SPEC, CAUSAL, IMAGES, replace(SPEC, lora_dropout=0.1)])
@pytest.mark.parametrize(("rank", "trainable"), [(1, None), (5, None), (5, (3, 0)), (3, (2,))])
def test_a_step_is_what_torch_counts(spec, rank, trainable):
    model, plan = loaded(spec, rank, trainable)
    row = row_of(spec)
    for rows, length in ((1, 7), (6, 11)):
        assert rows * row.training(plan, length) == counted_step(model, rows, length)


@pytest.mark.parametrize("factors", ["A", "B"])
def test_of_one_factor_only_its_gradient_counts(factors):
    model = SPEC.build()
    adapter = random_adapter(model, 4)
    held = tuple(range(4))
    plan = TrainPlan(dict.fromkeys(adapter.modules, ModulePlan(held, held[:3], factors=factors)))
    model.load(adapter, plan)

    assert 3 * row_of(SPEC).training(plan, 8) == counted_step(model.train(), 3, 8)


def test_modules_of_different_ranks_count_each_its_own():
    model = SPEC.build()
    adapter = random_adapter(model, lambda name: {QUERY: 1, WIDE: 6}.get(name, 3))
    plan = plan_for(adapter)
    model.load(adapter, plan)

    assert 2 * row_of(SPEC).training(plan, 9) == counted_step(model.train(), 2, 9)


def test_a_frozen_head_has_no_gradient():
    model, plan = loaded(SPEC, 3, head="frozen")
    row = row_of(SPEC, head="frozen")

    assert 4 * row.training(plan, 6) == counted_step(model, 4, 6)
    assert row.training(plan, 6) < row_of(SPEC).training(plan, 6)


@pytest.mark.parametrize("spec", [SPEC, CAUSAL])
def test_checkpointing_computes_the_way_there_twice(spec):
    model, plan = loaded(spec, 3)
    model.checkpoint_gradients(True)
    row = row_of(spec, checkpointing=True)

    # Once all that is needed is there, the second time ends: a product before.
    assert 2 * row.training(plan, 6) == pytest.approx(counted_step(model, 2, 6), rel=0.03)
    assert row.training(plan, 6) > 1.2 * row_of(spec).training(plan, 6)


def test_scores_cost_the_way_there():
    model, plan = loaded(SPEC, 4)
    lengths = [3, 5, 5]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
        for length in lengths:
            model(*model.blank_batch(1, length).inputs)

    assert row_of(SPEC).of_scores(plan, lengths) == counter.get_total_flops()


def counted_training(spec, plan_of, rows, options):
    model = spec.build()
    adapter = random_adapter(model, 4)
    with sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
        result = train(model, adapter, plan_of(adapter), rows, options, seed=3)
    return row_of(spec).of_passes(result.passes), counter.get_total_flops()


CHOICE = ComponentChoice("sensitivity", "module")


@pytest.mark.parametrize(
    "settings",
    [
        {"local_epochs": 2},
        {"max_steps": 2},
        {"importance": "sensitivity", "probe_batches": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_training_is_what_torch_counts_around_it(settings, micro_batch_size):
    options = replace(OPTIONS, micro_batch_size=micro_batch_size)

    ours, torchs = counted_training(
        SPEC, lambda adapter: plan_for(adapter, (1, 2), **settings), ROWS, options
    )

    assert ours == torchs > 0


def test_a_choice_by_the_client_counts_its_probe_and_what_it_chose():
    def plan(adapter):
        held = tuple(range(4))
        module = ModulePlan(held, held, budget=2)
        return TrainPlan(dict.fromkeys(adapter.modules, module), choice=CHOICE)

    ours, torchs = counted_training(SPEC, plan, ROWS, OPTIONS)

    assert ours == torchs > 0


def test_together_clients_count_what_they_would_alone():
    model = SPEC.build()
    tasks = [
        Task(adapter, plan_for(adapter), random_rows(9, seed), OPTIONS, seed)
        for seed, adapter in enumerate(random_adapter(model, rank) for rank in (1, 3))
    ]

    together = train_cohort(model, tasks)

    alone = [train(model, t.adapter, t.plan, t.examples, t.options, t.seed) for t in tasks]
    assert [one.passes for one in together] == [one.passes for one in alone]
    assert all(one.passes for one in alone)


@pytest.mark.parametrize(("spec", "rows"), [(CAUSAL, random_pairs(7)), (IMAGES, random_images(7))])
def test_answers_and_images_count_too(spec, rows):
    ours, torchs = counted_training(spec, plan_for, rows, OPTIONS)

    assert ours == torchs > 0


def test_counts_are_kept(tmp_path, monkeypatch):
    found = row_flops(SPEC, folder=tmp_path)
    monkeypatch.setattr("hafl_app.training.flops._count", None)

    again = row_flops(SPEC, folder=tmp_path)

    assert isinstance(again, RowFlops)
    plan = loaded(SPEC, 2)[1]
    assert again.training(plan, 8) == found.training(plan, 8)


def test_quantized_weights_cost_the_same_products():
    spec = CausalSpec(replace(CAUSAL.base, quantization="int8"), seed=7)
    assert row_flops(spec) == row_of(CAUSAL)
