"""HAFL with the choice on the client: its own scores, both schemes, and what is refused."""

import numpy as np
import pytest
import torch
from driving import MAX_RANK, Client, strategy_named
from training_factories import LABELS, TINY, random_adapter, random_rows

from hafl_app.config.compose import compose
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.component_choice import ComponentChoice
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.run import build
from hafl_app.server.compatibility import check_privacy
from hafl_app.server.method import StrategyError
from hafl_app.training.batches import training_batches
from hafl_app.training.classifier import ClassifierSpec, LoraClassifier
from hafl_app.training.local import train
from hafl_app.training.settings import TrainOptions

LAYERS = {"encoder.layer.0.intermediate.dense": 5, "encoder.layer.0.output.dense": 4}
SPEC = ClassifierSpec(TINY, num_labels=LABELS, target_modules=tuple(LAYERS), seed=7)
ROWS = random_rows(22, seed=3)
OPTIONS = TrainOptions(batch_size=4, learning_rate=1e-2)


@pytest.fixture(scope="module")
def model() -> LoraClassifier:
    return LoraClassifier(SPEC)


@pytest.fixture(scope="module")
def received(model):
    return random_adapter(model, LAYERS.get, seed=11)


def chosen_of(model, received, **rule):
    modules = {
        name: ModulePlan(tuple(range(rank)), tuple(range(rank)), 0.5, budget=2)
        for name, rank in LAYERS.items()
    }
    plan = TrainPlan(modules, choice=ComponentChoice("smoothed", "module", **rule))
    return train(model, received, plan, ROWS, OPTIONS, seed=1)


def by_equation(model, received, num_batches, smoothing):
    """mean |b g| + mean |a g|, smoothed over batches from 0 and corrected for that start."""
    modules = {n: ModulePlan(tuple(range(r)), tuple(range(r)), 0.5) for n, r in LAYERS.items()}
    model.load(received, TrainPlan(modules))
    model.train()
    batches = training_batches(ROWS, OPTIONS.batch_size, np.random.default_rng(1))
    averages = {name: np.zeros(rank) for name, rank in LAYERS.items()}
    torch.manual_seed(1)  # of the base model's dropout
    for _, rows in zip(range(num_batches), batches, strict=False):
        model.clear_gradients()
        model.loss(model.batch(ROWS, rows)).backward()
        for name, (a, b) in model.trainable_factors().items():
            of_a = (a.detach() * a.grad).abs().double().numpy().mean(1)
            of_b = (b.detach() * b.grad).abs().double().numpy().mean(0)
            averages[name] = smoothing * averages[name] + (1 - smoothing) * (of_a + of_b)
    return averages


@pytest.mark.parametrize("num_batches", [1, 3])
def test_a_client_chooses_by_its_smoothed_loss_gradient(model, received, num_batches):
    result = chosen_of(model, received, probe_steps=num_batches, smoothing=0.7)

    scores = by_equation(model, received, num_batches, 0.7)
    for name, values in scores.items():
        assert result.plan.modules[name].trainable == tuple(sorted(np.argsort(values)[-2:]))


@pytest.mark.parametrize("drops_rest", [False, True])
def test_truncation_drops_what_was_not_chosen(model, received, drops_rest):
    result = chosen_of(model, received, probe_steps=1, drops_rest=drops_rest)
    chosen = {name: module.trainable for name, module in result.plan.modules.items()}
    sent, modules = received, {}
    for name, components in chosen.items():
        held = components if drops_rest else tuple(range(LAYERS[name]))
        modules[name] = ModulePlan(held, components, 0.5)
    if drops_rest:
        factors = {n: f.select(chosen[n]) for n, f in received.modules.items()}
        sent = type(received)(factors, received.head)

    alone = train(model, sent, TrainPlan(modules), ROWS, OPTIONS, seed=1)

    for name, factors in alone.adapter.modules.items():
        assert torch.equal(factors.lora_B, result.adapter.modules[name].lora_B)
    assert result.plan.modules["encoder.layer.0.output.dense"].held == (0, 1, 2, 3)


def test_the_plan_states_the_rule_and_asks_for_no_scores():
    for scheme in ("freezing", "truncation"):
        strategy = strategy_named(
            "hafl",
            "strategy.selection_by=client",
            f"strategy.scheme={scheme}",
            "strategy.probe_batches=7",
        )
        plan = strategy.plan(Client(2, 10, 0).profile, 1)
        rule = ComponentChoice("smoothed", "module", 7, 0.85, 0.1, scheme == "truncation")
        assert plan.choice == rule
        assert plan.importance == "none"
        assert {m.budget for m in plan.modules.values()} == {2}
        assert {len(m.held) for m in plan.modules.values()} == {MAX_RANK}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy.selection=random"], "strategy.selection=random is refused"),
        (["strategy.importance=magnitude"], "strategy.importance=magnitude is refused"),
        (["strategy.source=server"], "strategy.source=server is refused"),
        (["strategy=haflq"], "federation.upload=mixed is refused"),
        (["privacy=central_dp"], "components that clients choose by their data"),
    ],
)
def test_what_no_client_can_choose_by_is_refused(overrides, message):
    settings = compose(["strategy=hafl", *overrides, "strategy.selection_by=client"])
    strategy = build.strategy(settings)
    strategy.options = build.run_options(settings)
    with pytest.raises(StrategyError, match=message):
        strategy.check([1, 2])
        check_privacy(strategy, [])


def test_the_server_still_selects_unless_told():
    plan = strategy_named("hafl").plan(Client(2, 10, 0).profile, 1)
    assert plan.choice is None
    assert plan.importance == "smoothed"
