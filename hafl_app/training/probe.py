"""Probes: what is measured on a few batches before a training, where its plan asks for it."""

from collections.abc import Generator
from dataclasses import replace
from itertools import islice
from typing import cast

import numpy as np

from hafl_app.plan import ImportanceMeasure, TrainPlan
from hafl_app.plan_parts.component_choice import ComponentChoice
from hafl_app.training.batches import training_batches
from hafl_app.training.choosing import chosen_plan, contributions, probe_plan
from hafl_app.training.epochs import Allowance, optimize
from hafl_app.training.importance_meter import ImportanceMeter
from hafl_app.training.task import Load, Scores, Task, Wanted


def probed_plan(
    task: Task, load: Load, allowance: Allowance
) -> Generator[Wanted, float, tuple[TrainPlan, Scores]]:
    """Return the plan after the client's choice, and the importance of what it holds.

    Both are measured on a few batches before training, where the plan asks for them.
    """
    plan = task.plan
    if plan.choice is not None:
        scores = yield from _choice_scores(task, load, allowance, plan.choice)
        return chosen_plan(plan, scores, task.seed), {}
    if not plan.probe_batches or plan.importance == "none":
        return plan, {}
    probe = replace(task, plan=plan.training_everything())
    meter = ImportanceMeter(plan.importance, plan.importance_smoothing)
    return plan, (yield from _gradient_scores(probe, load, meter, plan.probe_batches))


def _choice_scores(
    task: Task, load: Load, allowance: Allowance, rule: ComponentChoice
) -> Generator[Wanted, float, Scores]:
    """Score what the client may choose from: by a probe that trains it, or by its gradients."""
    plan = probe_plan(task.plan)
    probe = replace(task, plan=plan)
    if rule.measure != "contribution":
        meter = ImportanceMeter(cast(ImportanceMeasure, rule.measure), rule.smoothing)
        return (yield from _gradient_scores(probe, load, meter, plan.max_steps or None))
    trainee, no_meter = load(task.adapter, plan), ImportanceMeter("none", 0.0)
    yield from optimize(probe, trainee, no_meter, allowance.of_probe(plan.max_steps), None)
    return contributions(task.adapter, trainee.trained(plan), plan)


def _gradient_scores(
    task: Task, load: Load, meter: ImportanceMeter, most_batches: int | None
) -> Generator[Wanted, float, Scores]:
    """Measure what the task's plan trains on a few batches of a pass, without a step."""
    trainee = load(task.adapter, task.plan)
    trainee.train()
    rng = np.random.default_rng(task.seed)
    batches = training_batches(task.examples, task.options.batch_size, rng)
    for rows in islice(batches, most_batches):
        yield Wanted(trainee, rows, tail=None)
        meter.update(trainee)
    return meter.scores()
