"""LoRA-A2: turns of the factors, what a client chooses, what the mean is, and what it costs."""

import numpy as np
import pytest
import torch
from driving import MAX_RANK, Client, merge, noise, strategy_named, update_of
from training_factories import LABELS, TINY, random_adapter, random_rows

from hafl_app.config.compose import compose
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.component_choice import ComponentChoice
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.server.method import StrategyError
from hafl_app.training.classifier import ClassifierSpec, LoraClassifier
from hafl_app.training.local import train
from hafl_app.training.settings import TrainOptions

CLIENTS = [Client(rank, n, i) for i, (rank, n) in enumerate([(1, 10), (3, 25), (2, 7)])]
LAYERS = {"encoder.layer.0.intermediate.dense": 5, "encoder.layer.0.output.dense": 4}
SPEC = ClassifierSpec(TINY, num_labels=LABELS, target_modules=tuple(LAYERS), seed=7)
ROWS = random_rows(22, seed=3)
# Steps of 4 rows: a pass is 6 of them. lora_B learns five times as fast.
OPTIONS = TrainOptions(batch_size=4, learning_rate=1e-2, lora_B_lr_ratio=5.0)
TOTAL = 3


@pytest.fixture(scope="module")
def model() -> LoraClassifier:
    return LoraClassifier(SPEC)


@pytest.fixture(scope="module")
def received(model):
    return random_adapter(model, LAYERS.get, seed=11)


def plan_of(factors, rule, budgets=(2, 1), **settings) -> TrainPlan:
    modules = {
        name: ModulePlan(tuple(range(rank)), tuple(range(rank)), 0.5, factors=factors, budget=b)
        for (name, rank), b in zip(LAYERS.items(), budgets, strict=True)
    }
    return TrainPlan(modules, choice=rule, **settings)


def fixed(plan: TrainPlan, trainable) -> TrainPlan:
    """The plan of a client without a choice."""
    modules = {
        name: ModulePlan(m.held, trainable[name], m.scaling, factors=m.factors)
        for name, m in plan.modules.items()
    }
    return TrainPlan(modules, max_steps=plan.max_steps, local_epochs=plan.local_epochs)


def best_by_equation(received, probed, factors, total):
    """||delta b_i|| ||a_i||, or ||b_i|| ||delta a_i||, sorted over both modules."""
    scores = []
    for name, start in received.modules.items():
        a, b = start.lora_A.double().numpy(), start.lora_B.double().numpy()
        after = probed.modules[name]
        for i in range(len(a)):
            if factors == "B":
                change = after.lora_B.double().numpy()[:, i] - b[:, i]
                score = np.sqrt((change**2).sum()) * np.sqrt((a[i] ** 2).sum())
            else:
                change = after.lora_A.double().numpy()[i] - a[i]
                score = np.sqrt((change**2).sum()) * np.sqrt((b[:, i] ** 2).sum())
            scores.append((score, name, i))
    chosen = sorted(scores, reverse=True)[:total]
    return {n: tuple(sorted(i for _, name, i in chosen if name == n)) for n in received.modules}


class TestTheChoice:
    @pytest.mark.parametrize("factors", ["B", "A"])
    def test_is_of_the_largest_contributions_over_the_model(self, model, received, factors):
        plan = plan_of(factors, ComponentChoice("contribution", "model"), local_epochs=2)
        everything = fixed(plan, {n: m.held for n, m in plan.modules.items()})
        one_pass = TrainPlan(everything.modules)
        probed = train(model, received, one_pass, ROWS, OPTIONS, seed=1).adapter
        expected = best_by_equation(received, probed, factors, TOTAL)

        result = train(model, received, plan, ROWS, OPTIONS, seed=1)

        assert {n: m.trainable for n, m in result.plan.modules.items()} == expected
        assert {n: f.rank for n, f in result.adapter.modules.items()} == {
            n: len(components) for n, components in expected.items()
        }
        assert result.steps == 12
        assert result.probe_seconds > 0

    def test_differs_from_what_budgets_by_module_would_be(self, model, received):
        # Else the tests above would not tell the two scopes apart.
        by_model, by_module = (
            train(
                model,
                received,
                plan_of("B", ComponentChoice("contribution", scope)),
                ROWS,
                OPTIONS,
                seed=1,
            ).plan
            for scope in ("model", "module")
        )
        counts = [len(m.trainable) for m in by_module.modules.values()]
        assert counts == [2, 1]
        assert [len(m.trainable) for m in by_model.modules.values()] != counts

    def test_training_starts_from_what_was_received(self, model, received):
        plan = plan_of("B", ComponentChoice("contribution", "model"))
        result = train(model, received, plan, ROWS, OPTIONS, seed=1)
        chosen = {name: module.trainable for name, module in result.plan.modules.items()}

        alone = train(model, received, fixed(plan, chosen), ROWS, OPTIONS, seed=1)

        for name, factors in alone.adapter.modules.items():
            assert torch.equal(factors.lora_B, result.adapter.modules[name].lora_B)
        for name, tensor in alone.adapter.head.items():
            assert torch.equal(tensor, result.adapter.head[name])

    def test_follows_from_the_seed(self, model, received):
        plan = plan_of("B", ComponentChoice("contribution", "model", exploration=1.0))
        seeds = [1, 1, *range(2, 9)]
        plans = [train(model, received, plan, ROWS, OPTIONS, seed=s).plan for s in seeds]
        assert plans[0] == plans[1]
        assert any(other != plans[0] for other in plans[2:])

    @pytest.mark.parametrize(("probe_steps", "max_steps", "steps"), [(2, 0, 2), (4, 3, 3)])
    def test_a_probe_may_be_shorter_and_is_never_longer_than_training(
        self, model, received, probe_steps, max_steps, steps
    ):
        rule = ComponentChoice("contribution", "model", probe_steps)
        plan = plan_of("B", rule, max_steps=max_steps)
        everything = fixed(plan, {n: m.held for n, m in plan.modules.items()})
        short = TrainPlan(everything.modules, max_steps=steps)
        probed = train(model, received, short, ROWS, OPTIONS, seed=1).adapter

        result = train(model, received, plan, ROWS, OPTIONS, seed=1)

        chosen = {n: m.trainable for n, m in result.plan.modules.items()}
        assert chosen == best_by_equation(received, probed, "B", TOTAL)

    @pytest.mark.parametrize("measure", ["sensitivity", "smoothed", "adalora"])
    def test_by_gradients_takes_no_step(self, model, received, measure):
        plan = plan_of("B", ComponentChoice(measure, "module", probe_steps=2))
        first = train(model, received, plan, ROWS, OPTIONS, seed=1)
        again = train(model, received, plan, ROWS, OPTIONS, seed=1)
        assert first.plan == again.plan
        assert first.importance == {}
        assert [len(m.trainable) for m in first.plan.modules.values()] == [2, 1]


class TestTheRounds:
    def test_factors_take_turns_and_lora_b_begins(self):
        strategy, profile = strategy_named("lora_a2"), CLIENTS[1].profile
        factors = [
            {m.factors for m in strategy.plan(profile, t).modules.values()} for t in range(1, 5)
        ]
        assert factors == [{"B"}, {"A"}, {"B"}, {"A"}]

    @pytest.mark.parametrize("server_round", [1, 2])
    def test_the_mean_of_changes_is_over_all_participants(self, server_round):
        strategy = strategy_named("lora_a2")
        updates = [update_of(strategy, client, noise, server_round) for client in CLIENTS]

        after = merge(strategy, updates)

        for name, before in strategy.global_adapter.modules.items():
            a, b = before.lora_A.double().numpy(), before.lora_B.double().numpy()
            new_a, new_b = a.copy(), b.copy()
            for update in updates:
                share = update.num_examples / (10 + 25 + 7)
                for place, i in enumerate(update.plan.modules[name].trainable):
                    theirs = update.adapter.modules[name]
                    new_a[i] += share * (theirs.lora_A[place].double().numpy() - a[i])
                    new_b[:, i] += share * (theirs.lora_B[:, place].double().numpy() - b[:, i])
            np.testing.assert_allclose(after[name].lora_A, new_a, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(after[name].lora_B, new_b, rtol=1e-5, atol=1e-6)
            still, moved = ("lora_A", "lora_B") if server_round == 1 else ("lora_B", "lora_A")
            assert torch.equal(getattr(after[name], still), getattr(before, still))
            assert not torch.equal(getattr(after[name], moved), getattr(before, moved))

    def test_the_mean_of_products_is_exact(self):
        strategy = strategy_named("lora_a2")
        updates = [update_of(strategy, client, noise) for client in CLIENTS]
        total = sum(update.num_examples for update in updates)

        after = merge(strategy, updates)

        for name, before in strategy.global_adapter.modules.items():
            mean = torch.zeros_like(before.delta_weight(), dtype=torch.float64)
            for update in updates:
                whole = before.replace(update.components(name), update.adapter.modules[name])
                mean += update.num_examples / total * whole.delta_weight().double()
            torch.testing.assert_close(after[name].delta_weight().double(), mean)


class TestItsCost:
    def test_bytes_are_one_factor_of_the_budget_at_most(self):
        strategy, head = strategy_named("lora_a2"), 4 * (3 * 7 + 3)
        down, up = strategy.payload_bytes(Client(3, 10, 0).profile)
        assert down == 4 * MAX_RANK * (7 + 5 + 6 + 9) + head
        # Six vectors of lora_B: four of query, 7 long, and two of dense, 6 long.
        assert up == 4 * (4 * 7 + 2 * 6) + head
        by_module = strategy_named("lora_a2", "strategy.scope=module")
        assert by_module.payload_bytes(Client(3, 10, 0).profile)[1] == 4 * 3 * (7 + 6) + head

    def test_lora_b_learns_five_times_as_fast_unless_told_otherwise(self):
        assert compose(["strategy=lora_a2"]).client.lora_B_lr_ratio == 5
        told = compose(["strategy=lora_a2", "client.lora_B_lr_ratio=2"])
        assert told.client.lora_B_lr_ratio == 2
        assert compose(["strategy=ffa_lora"]).client.lora_B_lr_ratio == 1

    @pytest.mark.parametrize("robust", ["median", "trimmed_mean"])
    def test_robust_rules_are_refused(self, robust):
        settings = compose(["strategy=lora_a2", f"federation.robust={robust}"])
        strategy = strategy_named("lora_a2")
        strategy.options = strategy.options.__class__(federation=settings.federation)
        with pytest.raises(StrategyError, match="did not choose as unchanged"):
            strategy.check([1, 4])
