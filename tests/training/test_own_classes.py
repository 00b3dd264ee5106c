"""The loss under label skew: the equation, the classes that a client lacks, and who has it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from causal_factories import CAUSAL, random_pairs
from driving import STRATEGIES, Client, run_options, strategy_named
from training_factories import SPEC, differing, plan_for, random_adapter, random_rows, rows_of

from hafl_app.config.compose import SettingsError
from hafl_app.run import build
from hafl_app.server import local_baseline
from hafl_app.training.classifier import LoraClassifier
from hafl_app.training.cohort import train_cohort
from hafl_app.training.local import train
from hafl_app.training.lora_model import mean_loss
from hafl_app.training.own_classes import OwnClasses
from hafl_app.training.settings import TrainOptions
from hafl_app.training.task import Task, TrainingError

LABELS = np.array([2, 0, 2, 2, 0, 2])  # of four classes: 1 and 3 are missing
OPTIONS = TrainOptions(batch_size=4, optimizer="sgd", learning_rate=0.5, max_grad_norm=0)


@pytest.fixture(scope="module")
def classifier() -> LoraClassifier:
    return SPEC.build()


def by_equation(logits, targets, tau):
    """-log of n_y^tau e^z_y / sum_c n_c^tau e^z_c over the client's own classes, in numpy."""
    counts = {c: LABELS.tolist().count(c) for c in set(LABELS.tolist())}
    losses = []
    for row, target in zip(logits, targets, strict=True):
        weights = {c: n**tau * np.exp(row[c]) for c, n in counts.items()}
        losses.append(-np.log(weights[int(target)] / sum(weights.values())))
    return np.mean(losses)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_is_the_equation(tau):
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = torch.tensor([2, 0, 0, 2, 2])
    loss = mean_loss(logits, targets, OwnClasses(LABELS, tau))
    expected = by_equation(logits.numpy(), targets.numpy(), tau)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert loss.item() != pytest.approx(mean_loss(logits, targets).item(), rel=1e-3)


def test_a_missing_class_gets_no_gradient_in_the_head():
    logits = torch.zeros(2, 4, requires_grad=True)
    mean_loss(logits, torch.tensor([0, 2]), OwnClasses(LABELS, 1.0)).backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[:, [1, 3]].any()
    assert logits.grad[:, [0, 2]].all()


class TestTraining:
    ROWS = replace(random_rows(12, seed=5), labels=np.array([0, 2] * 3 + [2] * 6))

    def trained(self, classifier, tau, **settings):
        adapter = random_adapter(classifier, 3, seed=2)
        plan = plan_for(adapter, logit_adjustment=tau, local_epochs=2, **settings)
        return adapter, train(classifier, adapter, plan, self.ROWS, OPTIONS, seed=1)

    def test_leaves_missing_classes_out_of_the_head(self, classifier):
        moved = {}
        for tau in (None, 0.0, 1.0):
            adapter, result = self.trained(classifier, tau)
            change = result.adapter.head["weight"] - adapter.head["weight"]
            moved[tau] = change.norm(dim=1)
        assert (moved[None] > 0).all()
        for tau in (0.0, 1.0):
            assert moved[tau][1] == 0
            assert (moved[tau][[0, 2]] > 0).all()
        assert not torch.equal(moved[0.0], moved[1.0])

    def test_in_micro_batches_is_the_same(self, classifier):
        adapter, whole = self.trained(classifier, 1.0)
        plan = plan_for(adapter, logit_adjustment=1.0, local_epochs=2)
        parts = replace(OPTIONS, micro_batch_size=3)
        result = train(classifier, adapter, plan, self.ROWS, parts, seed=1)
        for name, tensor in whole.adapter.tensors().items():
            torch.testing.assert_close(result.adapter.tensors()[name], tensor, rtol=1e-3, atol=1e-4)

    def test_of_a_cohort_has_each_clients_own_classes(self, classifier):
        adapter = random_adapter(classifier, 3, seed=2)
        texts = [[7, 8, 9 + n] for n in range(8)]
        labels = ([0, 1] * 4, [2, 1] * 4, [0] * 8, [1, 2] * 4)
        tasks = [
            Task(adapter, plan_for(adapter, logit_adjustment=tau), rows_of(texts, own), OPTIONS, 3)
            for own, tau in zip(labels, (0.0, 1.0, 1.0, None), strict=True)
        ]
        for task, joint in zip(tasks, train_cohort(classifier, tasks), strict=True):
            single = train(classifier, adapter, task.plan, task.examples, OPTIONS, seed=3)
            assert joint.loss == pytest.approx(single.loss, rel=1e-4, abs=1e-6)
            for name, tensor in single.adapter.tensors().items():
                got = joint.adapter.tensors()[name]
                torch.testing.assert_close(got, tensor, rtol=1e-3, atol=1e-4)

    def test_none_is_plain_cross_entropy_to_the_bit(self, classifier):
        _, plain = self.trained(classifier, None)
        adapter = random_adapter(classifier, 3, seed=2)
        plan = plan_for(adapter, local_epochs=2)
        again = train(classifier, adapter, plan, self.ROWS, OPTIONS, seed=1)
        assert differing(plain.adapter, again.adapter) == []

    def test_a_model_without_classes_refuses_it(self):
        model = CAUSAL.build()
        adapter = random_adapter(model, 2)
        plan = plan_for(adapter, logit_adjustment=0.0)
        with pytest.raises(TrainingError, match="logit_adjustment needs classes"):
            train(model, adapter, plan, random_pairs(4), OPTIONS, seed=1)


class TestPlans:
    @pytest.mark.parametrize("name", STRATEGIES)
    def test_of_every_method_have_the_clients_setting(self, name):
        strategy = strategy_named(name)
        assert strategy.plan(Client(3, 10, 0).profile, 1).logit_adjustment is None
        strategy.options = run_options(strategy.options, logit_adjustment=0.5)
        assert strategy.plan(Client(3, 10, 0).profile, 1).logit_adjustment == 0.5

    def test_of_clients_that_train_alone_have_none(self, monkeypatch):
        strategy = strategy_named("rbla")
        strategy.options = run_options(strategy.options, logit_adjustment=0.5)
        seen = []

        class Messages:
            def messages(self, profiles, plans, dispatch, kind):
                seen.extend(plans)
                raise KeyboardInterrupt

        monkeypatch.setattr(strategy.coordinator, "messages", lambda *_: Messages())
        profile = Client(2, 9, 0).profile
        with pytest.raises(KeyboardInterrupt):
            local_baseline.train_alone(strategy, None, strategy.global_adapter, [profile], 1)
        assert [plan.logit_adjustment for plan in seen] == [None]


def test_a_language_model_refuses_it_before_the_run():
    config = {"overrides": "experiment=dolly_stories260k client.logit_adjustment=1"}
    with pytest.raises(SettingsError, match=r"client\.logit_adjustment=1: .* no classes"):
        build.settings_of_run(config)
