import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_factories import (
    QUERY,
    SPEC,
    WIDE,
    assert_same_adapter,
    differing,
    parameters_of,
    plan_for,
    random_adapter,
    random_rows,
    rows_of,
    with_module,
)

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.plan_parts.tail_pruning import TailPruning
from hafl_app.training import local
from hafl_app.training.classifier import LoraClassifier
from hafl_app.training.evaluate import evaluate
from hafl_app.training.importance_meter import ImportanceMeter
from hafl_app.training.local import train
from hafl_app.training.lora_layers import FROZEN, TRAINABLE
from hafl_app.training.settings import TrainOptions
from hafl_app.training.task import LossNotFiniteError, TrainingError

ROWS = random_rows(22)
OPTIONS = TrainOptions(batch_size=4, learning_rate=1e-2)  # six steps an epoch
# Large steps, and a decay that would be seen in one step on anything it reaches.
DECAYING = replace(OPTIONS, weight_decay=0.3)
SGD = TrainOptions(batch_size=4, optimizer="sgd", learning_rate=0.1, max_grad_norm=0)


@pytest.fixture(scope="module")
def classifier() -> LoraClassifier:
    return LoraClassifier(SPEC)


@pytest.fixture
def adapter(classifier) -> Adapter:
    return random_adapter(classifier, 5)


@pytest.fixture
def slow_steps(monkeypatch):
    """Let every batch take ten seconds, on a clock that nothing else moves."""
    clock, forward = itertools.count(0, 10), LoraClassifier.forward
    now = [0.0]

    def slow(classifier, *inputs):
        now[0] = float(next(clock) + 10)
        return forward(classifier, *inputs)

    monkeypatch.setattr(LoraClassifier, "forward", slow)
    monkeypatch.setattr(local.time, "perf_counter", lambda: now[0])


class TestFreezing:
    @pytest.mark.parametrize(
        "options", [DECAYING, replace(DECAYING, optimizer="sgd")], ids=["adamw", "sgd"]
    )
    def test_only_what_the_plan_trains_moves(self, classifier, adapter, options):
        plan = plan_for(adapter, (4, 1), scaling=2.0, local_epochs=2)

        result = train(classifier, adapter, plan, ROWS, options, seed=1)

        assert result.steps == 12
        frozen, trainable = (parameters_of(classifier, part) for part in (FROZEN, TRAINABLE))
        for name, sent in adapter.modules.items():
            lora_A, lora_B = frozen[name]
            kept = sent.select((0, 2, 3))
            assert torch.equal(lora_A, kept.lora_A), name
            assert torch.equal(lora_B, kept.lora_B / 2), name
            assert not (lora_A.requires_grad or lora_B.requires_grad)
            assert lora_A.grad is None
            assert lora_B.grad is None
            before, after = sent.select((4, 1)), result.adapter.modules[name]
            assert not (after.lora_A == before.lora_A).all(dim=1).any(), name
            assert not (after.lora_B == before.lora_B).all(dim=0).any(), name
            assert torch.equal(trainable[name][1] * 2, after.lora_B)
        assert not torch.equal(result.adapter.head["weight"], adapter.head["weight"])

    def test_a_module_with_nothing_to_train_comes_back_empty(self, classifier, adapter):
        plan = plan_for(adapter)
        plan = replace(plan, modules={**plan.modules, WIDE: ModulePlan((0, 1, 2, 3, 4), ())})

        result = train(classifier, adapter, plan, ROWS, DECAYING, seed=1)

        assert result.adapter.modules[WIDE].rank == 0
        assert result.adapter.modules[WIDE].lora_B.shape == (48, 0)
        assert torch.equal(parameters_of(classifier, FROZEN)[WIDE][0], adapter.modules[WIDE].lora_A)
        assert result.adapter.modules[QUERY].rank == 5

    def test_frozen_components_take_part_in_the_forward_pass(self, classifier, adapter):
        plan = plan_for(adapter, (4, 1), max_steps=1)
        without = adapter.map(
            lambda f: f.replace((0, 2, 3), LoraFactors(f.lora_A[:3] * 0, f.lora_B[:, :3] * 0))
        )

        losses = [train(classifier, a, plan, ROWS, OPTIONS, 1).loss for a in (adapter, without)]

        assert abs(losses[0] - losses[1]) > 1e-3

    def test_a_frozen_head_stays(self, adapter):
        classifier = LoraClassifier(SPEC)  # nothing has trained this one's head before
        plan = plan_for(adapter, (4, 1), head="frozen")

        result = train(classifier, adapter, plan, ROWS, DECAYING, seed=1)

        assert torch.equal(result.adapter.head["weight"], adapter.head["weight"])
        assert torch.equal(result.adapter.head["bias"], adapter.head["bias"])
        assert all(p.grad is None for p in classifier.head_module.parameters())

    def test_a_head_may_train_alone(self, classifier, adapter):
        tail = TailPruning(decay=0.5, weight=0.1, min_rank=1)
        plan = plan_for(adapter, (), tail=tail)

        result = train(classifier, adapter, plan, ROWS, OPTIONS, seed=1)

        assert not torch.equal(result.adapter.head["weight"], adapter.head["weight"])
        assert {f.rank for f in result.adapter.modules.values()} == {0}

    def test_a_plan_that_trains_nothing_is_refused(self, classifier, adapter):
        with pytest.raises(TrainingError, match="trains nothing"):
            train(classifier, adapter, plan_for(adapter, (), head="frozen"), ROWS, OPTIONS, 1)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_holds_on_cuda_in_bf16(self, adapter):
        classifier = LoraClassifier(SPEC).to("cuda")
        plan = plan_for(adapter, (4, 1), max_steps=1)

        result = train(classifier, adapter, plan, ROWS, replace(DECAYING, precision="bf16"), seed=1)

        assert math.isfinite(result.loss)
        for name, (lora_A, lora_B) in parameters_of(classifier, FROZEN).items():
            kept = adapter.modules[name].select((0, 2, 3))
            assert torch.equal(lora_A.cpu(), kept.lora_A)
            assert torch.equal(lora_B.cpu(), kept.lora_B)
            after = result.adapter.modules[name]
            assert after.lora_B.dtype == torch.float32
            assert not torch.equal(after.lora_B, adapter.modules[name].select((4, 1)).lora_B)


class TestTraining:
    def test_learns(self, classifier, adapter):
        rows = rows_of([[7, 7], [9, 9, 9], [11]] * 8, [0, 1, 2] * 8)  # a word says the class
        plan = plan_for(adapter, max_steps=1)

        first = train(classifier, adapter, plan, rows, OPTIONS, seed=1)
        last = train(
            classifier, adapter, replace(plan, max_steps=0, local_epochs=8), rows, OPTIONS, 1
        )

        assert last.loss < 0.5 * first.loss
        assert (first.num_examples, first.steps, last.steps) == (24, 1, 48)

    def test_the_seed_decides_every_bit(self, classifier, adapter):
        plan = plan_for(adapter, (0, 3))
        classifier_again = LoraClassifier(SPEC)
        first, again, other = (
            train(c, adapter, plan, ROWS, OPTIONS, seed)
            for c, seed in ((classifier, 1), (classifier_again, 1), (classifier, 2))
        )

        assert_same_adapter(first.adapter, again.adapter)
        assert first.loss == again.loss
        assert len(differing(first.adapter, other.adapter)) == 14  # 12 modules, weight and bias

    def test_leaves_the_callers_random_state_and_adapter_alone(self, classifier, adapter):
        torch.manual_seed(5)
        state = torch.get_rng_state()

        train(classifier, adapter, plan_for(adapter), ROWS, OPTIONS, seed=1)

        assert torch.equal(torch.get_rng_state(), state)
        assert_same_adapter(adapter, random_adapter(classifier, 5))

    def test_stops_after_max_steps(self, classifier, adapter):
        plan = plan_for(adapter, local_epochs=3, max_steps=4)

        stopped = train(classifier, adapter, plan, ROWS, OPTIONS, seed=1)
        crossing = train(classifier, adapter, replace(plan, max_steps=8), ROWS, OPTIONS, seed=1)
        whole = train(
            classifier, adapter, replace(plan, max_steps=0, local_epochs=1), ROWS, OPTIONS, seed=1
        )

        assert (stopped.steps, crossing.steps, whole.steps) == (4, 8, 6)
        # The loss is that of the last epoch with a step in it, not of the empty ones after it.
        assert stopped.loss > 0.1

    @pytest.mark.parametrize(("max_seconds", "steps"), [(0, 12), (1e9, 12), (35, 4), (30, 3)])
    def test_stops_behind_the_step_in_which_the_time_is_over(
        self, classifier, adapter, slow_steps, max_seconds, steps
    ):
        plan = plan_for(adapter, local_epochs=2)  # twelve steps of ten seconds
        options = replace(OPTIONS, max_seconds=max_seconds)

        result = train(classifier, adapter, plan, ROWS, options, seed=1)

        assert (result.steps, result.out_of_time) == (steps, steps < 12)
        assert result.num_examples == 22  # its weight is its data, not its speed
        assert math.isfinite(result.loss)

    def test_takes_one_step_however_little_time_there_is(self, classifier, adapter, slow_steps):
        options = replace(OPTIONS, max_seconds=1e-9)

        result = train(classifier, adapter, plan_for(adapter), ROWS, options, seed=1)

        assert (result.steps, result.out_of_time) == (1, True)
        assert len(differing(result.adapter, adapter)) == 14

    def test_time_that_suffices_changes_no_bit(self, classifier, adapter):
        plan = plan_for(adapter)
        timed, untimed = (
            train(classifier, adapter, plan, ROWS, replace(OPTIONS, max_seconds=s), seed=1)
            for s in (1e9, 0.0)
        )

        assert_same_adapter(timed.adapter, untimed.adapter)
        assert not timed.out_of_time

    def test_steps_or_time_whichever_is_over_first(self, classifier, adapter, slow_steps):
        plan, options = plan_for(adapter, max_steps=2), replace(OPTIONS, max_seconds=35)
        by_steps = train(classifier, adapter, plan, ROWS, options, seed=1)
        by_time = train(classifier, adapter, replace(plan, max_steps=5), ROWS, options, seed=1)

        assert (by_steps.steps, by_steps.out_of_time) == (2, False)
        assert (by_time.steps, by_time.out_of_time) == (4, True)

    def test_the_probe_is_part_of_the_time(self, classifier, adapter, slow_steps):
        plan = plan_for(adapter, importance="sensitivity", probe_batches=3)

        result = train(classifier, adapter, plan, ROWS, replace(OPTIONS, max_seconds=35), seed=1)

        assert (result.steps, result.out_of_time) == (1, True)

    def test_reports_each_epoch_and_may_be_scored_in_between(self, classifier, adapter):
        plan, told = plan_for(adapter, local_epochs=3, max_steps=8), []

        def on_epoch(epoch, loss):
            told.append((epoch, loss))
            evaluate(classifier, ROWS)  # leaves the model in evaluation mode

        watched = train(classifier, adapter, plan, ROWS, OPTIONS, 1, on_epoch)

        unwatched = train(classifier, adapter, plan, ROWS, OPTIONS, seed=1)
        assert_same_adapter(watched.adapter, unwatched.adapter)
        assert [epoch for epoch, _ in told] == [1, 2]  # six steps, and the two that were left
        assert told[1][1] == watched.loss != told[0][1]

    def test_lora_b_has_its_own_learning_rate(self, classifier, adapter):
        plan = plan_for(adapter, max_steps=1)
        one, four = (
            train(classifier, adapter, plan, ROWS, replace(SGD, lora_B_lr_ratio=ratio), seed=1)
            for ratio in (1.0, 4.0)
        )

        for name, sent in adapter.modules.items():
            step = one.adapter.modules[name].lora_B - sent.lora_B
            larger = four.adapter.modules[name].lora_B - sent.lora_B
            torch.testing.assert_close(larger, 4 * step, rtol=1e-3, atol=1e-6)
            assert torch.equal(one.adapter.modules[name].lora_A, four.adapter.modules[name].lora_A)
        assert torch.equal(one.adapter.head["weight"], four.adapter.head["weight"])

    def test_gradients_are_clipped(self, classifier, adapter):
        plan = plan_for(adapter, max_steps=1)
        clipped = train(classifier, adapter, plan, ROWS, replace(SGD, max_grad_norm=1e-2), seed=1)

        squares = [
            (tensor - before).square().sum()
            for name, sent in adapter.modules.items()
            for tensor, before in (
                (clipped.adapter.modules[name].lora_A, sent.lora_A),
                (clipped.adapter.modules[name].lora_B, sent.lora_B),
            )
        ]
        squares += [(clipped.adapter.head[k] - v).square().sum() for k, v in adapter.head.items()]
        # one step of SGD moves by learning rate 0.1 times norm 1e-2
        assert math.sqrt(sum(squares)) == pytest.approx(1e-3, rel=1e-2)

    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite_is_an_error(self, classifier, adapter, poison):
        factors = adapter.modules[WIDE]
        poisoned = with_module(adapter, WIDE, LoraFactors(factors.lora_A, factors.lora_B * poison))

        with pytest.raises(LossNotFiniteError, match="the loss is nan in step 1, epoch 1"):
            train(classifier, poisoned, plan_for(adapter), ROWS, OPTIONS, seed=1)


class TestImportance:
    @pytest.mark.parametrize("measure", ["sensitivity", "smoothed", "adalora"])
    def test_is_the_written_out_recursion(self, classifier, adapter, measure):
        decay, steps = 0.6, 3
        classifier.load(adapter, plan_for(adapter, (4, 1, 2)))
        lora_A, lora_B = classifier.trainable_factors()[WIDE]
        rng = np.random.default_rng(0)
        gradients = [(rng.normal(size=(3, 32)), rng.normal(size=(48, 3))) for _ in range(steps)]

        meter = ImportanceMeter(measure, decay)
        for gradient_A, gradient_B in gradients:
            lora_A.grad = torch.tensor(gradient_A, dtype=torch.float32)
            lora_B.grad = torch.tensor(gradient_B, dtype=torch.float32)
            meter.update(classifier)

        expected = np.zeros(3)
        for component in range(3):
            for weights, steps_of in (
                (adapter.modules[WIDE].lora_A[[4, 1, 2]][component], [g for g, _ in gradients]),
                (
                    adapter.modules[WIDE].lora_B[:, [4, 1, 2]][:, component],
                    [g.T for _, g in gradients],
                ),
            ):
                total = smoothed = uncertainty = np.zeros(len(weights))
                for gradient in steps_of:
                    now = abs(weights.numpy() * gradient[component])
                    total = total + now
                    smoothed = decay * smoothed + (1 - decay) * now
                    uncertainty = decay * uncertainty + (1 - decay) * abs(now - smoothed)
                unbias = 1 - decay**steps
                expected[component] += {
                    "sensitivity": total / steps,
                    "smoothed": smoothed / unbias,
                    "adalora": smoothed * uncertainty / unbias**2,
                }[measure].mean()
        scores = meter.scores()
        assert set(scores) == {WIDE}  # the others have no gradient
        assert scores[WIDE].dtype == torch.float32
        np.testing.assert_allclose(scores[WIDE].numpy(), expected, rtol=1e-5)

    def test_is_measured_before_gradients_are_clipped(self, classifier, adapter):
        plan = plan_for(adapter, (4, 1), importance="smoothed", max_steps=1)
        clipped, whole = (
            train(classifier, adapter, plan, ROWS, replace(OPTIONS, max_grad_norm=norm), seed=1)
            for norm in (1e-6, 0)
        )

        assert_same_scores(clipped.importance, whole.importance)
        assert all(scores.shape == (2,) for scores in whole.importance.values())
        assert min(scores.min() for scores in whole.importance.values()) > 1e-5

    def test_nothing_is_measured_unless_asked(self, classifier, adapter):
        plan = plan_for(adapter, probe_batches=2)

        result = train(classifier, adapter, plan, ROWS, OPTIONS, seed=1)

        assert result.importance == {}
        assert result.probe_seconds == 0

    def test_measuring_changes_nothing_that_is_trained(self, classifier, adapter):
        results = [
            train(classifier, adapter, plan_for(adapter, (0, 2), importance=m), ROWS, OPTIONS, 1)
            for m in ("none", "adalora")
        ]

        assert_same_adapter(results[0].adapter, results[1].adapter)

    @pytest.mark.parametrize("factors", ["A", "B"])
    @pytest.mark.parametrize("measure", ["sensitivity", "smoothed", "adalora"])
    def test_of_one_factor_is_that_factors_share(self, classifier, adapter, measure, factors):
        both = plan_for(adapter, (4, 1, 2))
        modules = {name: replace(m, factors=factors) for name, m in both.modules.items()}
        scores = []
        for plan in (both, replace(both, modules=modules)):
            classifier.load(adapter, plan)
            meter = ImportanceMeter(measure, 0.6)
            for number in (1.0, 3.0):
                for lora_A, lora_B in classifier.trainable_factors().values():
                    # The other factor's sensitivity is 0, whether it is measured or not.
                    lora_A.grad = torch.full_like(lora_A, number * (factors == "A"))
                    lora_B.grad = torch.full_like(lora_B, number * (factors == "B"))
                    if not lora_A.requires_grad:
                        lora_A.grad = None
                    if not lora_B.requires_grad:
                        lora_B.grad = None
                meter.update(classifier)
            scores.append(meter.scores())

        assert scores[0].keys() == scores[1].keys() == adapter.modules.keys()
        for name, expected in scores[0].items():
            assert expected.min() > 0
            torch.testing.assert_close(scores[1][name], expected)


class TestProbe:
    def test_measures_all_that_is_held(self, classifier, adapter):
        plan = plan_for(adapter, (4, 1), importance="smoothed", probe_batches=1)

        probed = train(classifier, adapter, plan, ROWS, OPTIONS, seed=1)

        # One step that trains everything sees the same batch and the same dropout.
        everything = replace(plan.training_everything(), probe_batches=0, max_steps=1)
        expected = train(classifier, adapter, everything, ROWS, OPTIONS, seed=1)
        assert_same_scores(probed.importance, expected.importance)
        assert all(scores.shape == (5,) for scores in probed.importance.values())
        assert 0 < probed.probe_seconds < probed.seconds

    def test_takes_the_given_batches(self, classifier, adapter):
        plan = plan_for(adapter, (4, 1), importance="sensitivity", probe_batches=1)
        one, two, many = (
            train(classifier, adapter, replace(plan, probe_batches=n), ROWS, OPTIONS, 1).importance
            for n in (1, 2, 99)
        )

        assert not torch.equal(one[WIDE], two[WIDE])
        assert not torch.equal(two[WIDE], many[WIDE])  # an epoch has six, and that is enough

    def test_changes_nothing_that_is_trained(self, classifier, adapter):
        plan = plan_for(adapter, (4, 1), importance="smoothed", local_epochs=2)

        without = train(classifier, adapter, plan, ROWS, DECAYING, seed=1)
        probed = train(classifier, adapter, replace(plan, probe_batches=3), ROWS, DECAYING, seed=1)

        assert_same_adapter(probed.adapter, without.adapter)
        assert (probed.loss, probed.steps) == (without.loss, without.steps)


class TestTail:
    def test_starts_from_no_update_without_nan(self, classifier, adapter):
        start = adapter.map(lambda f: LoraFactors(f.lora_A, torch.zeros_like(f.lora_B)))
        plan = plan_for(start, tail=TailPruning(decay=0.5, weight=1.0, min_rank=1))

        result = train(classifier, start, plan, ROWS, OPTIONS, seed=1)

        for factors in result.adapter.modules.values():
            assert factors.lora_A.isfinite().all()
            assert factors.lora_B.isfinite().all()
            assert factors.lora_B[:, 2:].abs().max() > 0

    def test_gradient_is_that_of_the_norm_product(self, classifier, adapter):
        weight, scaling = 0.5, 2.0
        plan = plan_for(adapter, scaling=scaling, max_steps=1)
        tail = TailPruning(decay=0.7, weight=weight, min_rank=1, prune=False)  # floor(3.5) = 3

        plain, pulled = (
            train(classifier, adapter, replace(plan, tail=t), ROWS, SGD, seed=1).adapter
            for t in (None, tail)
        )

        for name, sent in adapter.modules.items():
            lora_A, lora_B = sent.lora_A[3:], sent.lora_B[:, 3:] / scaling
            # d (|B| |A|) / dB = |A| B / |B|, and the same for A
            pull_A = lora_B.norm() * lora_A / lora_A.norm()
            pull_B = lora_A.norm() * lora_B / lora_B.norm()
            moved_A = pulled.modules[name].lora_A - plain.modules[name].lora_A
            moved_B = (pulled.modules[name].lora_B - plain.modules[name].lora_B) / scaling
            rate = SGD.learning_rate * weight
            torch.testing.assert_close(moved_A[3:], -rate * pull_A, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(moved_B[:, 3:], -rate * pull_B, rtol=1e-3, atol=1e-5)
            assert torch.equal(moved_A[:3], torch.zeros(3, moved_A.shape[1]))
            assert torch.equal(moved_B[:, :3], torch.zeros(moved_B.shape[0], 3))

    def test_a_large_weight_shrinks_the_tail_and_only_it_is_pruned(self, classifier, adapter):
        keep = TailPruning(decay=0.7, weight=20.0, min_rank=1, prune=False)

        whole = train(classifier, adapter, plan_for(adapter, tail=keep), ROWS, OPTIONS, seed=1)
        pruned = train(
            classifier,
            adapter,
            plan_for(adapter, tail=replace(keep, prune=True)),
            ROWS,
            OPTIONS,
            seed=1,
        )

        for name, sent in adapter.modules.items():
            factors = whole.adapter.modules[name]
            assert tail_norm(factors, 3) < 0.9 * tail_norm(sent, 3)
            assert torch.equal(pruned.adapter.modules[name].lora_A, factors.lora_A[:3])
            assert torch.equal(pruned.adapter.modules[name].lora_B, factors.lora_B[:, :3])

    def test_a_tail_that_grew_is_kept(self, classifier, adapter):
        start = adapter.map(lambda f: LoraFactors(f.lora_A, torch.zeros_like(f.lora_B)))
        tail = TailPruning(decay=0.7, weight=0.0, min_rank=1)

        result = train(classifier, start, plan_for(start, tail=tail), ROWS, OPTIONS, seed=1)

        assert {f.rank for f in result.adapter.modules.values()} == {5}

    @pytest.mark.parametrize("factors", ["A", "B"])
    def test_of_one_factor_shrinks_that_one_and_is_pruned(self, classifier, adapter, factors):
        tail = TailPruning(decay=0.7, weight=20.0, min_rank=1)
        plan = plan_for(adapter, tail=tail)
        modules = {name: replace(m, factors=factors) for name, m in plan.modules.items()}

        pruned = train(
            classifier, adapter, replace(plan, modules=modules), ROWS, OPTIONS, seed=1
        ).adapter

        for name, pair in classifier.trainable_factors().items():
            sent, moved = adapter.modules[name], "AB".index(factors)
            tails = pair[0][3:], pair[1][:, 3:]
            before = sent.lora_A[3:], sent.lora_B[:, 3:]
            assert tails[moved].norm() < 0.95 * before[moved].norm()
            assert torch.equal(tails[1 - moved], before[1 - moved])
            assert pruned.modules[name].rank == 3

    @pytest.mark.parametrize(("min_rank", "left"), [(2, 2), (4, 4), (5, 5), (9, 5)])
    def test_never_below_the_minimum_rank(self, classifier, adapter, min_rank, left):
        tail = TailPruning(decay=0.3, weight=20.0, min_rank=min_rank)

        result = train(classifier, adapter, plan_for(adapter, tail=tail), ROWS, OPTIONS, seed=1)

        assert {f.rank for f in result.adapter.modules.values()} == {left}

    def test_is_the_tail_of_what_the_module_trains(self, classifier, adapter):
        # Of the trainable components (4, 1), in that order, component 1 is the tail.
        tail = TailPruning(decay=0.5, weight=20.0, min_rank=1)
        plan: TrainPlan = plan_for(adapter, (4, 1), tail=tail)

        pruned = train(classifier, adapter, plan, ROWS, OPTIONS, seed=1)

        whole = replace(plan, tail=replace(tail, prune=False))
        factors = train(classifier, adapter, whole, ROWS, OPTIONS, seed=1).adapter.modules[WIDE]
        assert torch.equal(pruned.adapter.modules[WIDE].lora_A, factors.lora_A[:1])
        distance = (factors.lora_A - adapter.modules[WIDE].lora_A[[4, 1]]).norm(dim=1)
        assert (distance < adapter.modules[WIDE].lora_A[[4, 1]].norm(dim=1)).all()


def tail_norm(factors: LoraFactors, start: int) -> float:
    return float(factors.lora_B[:, start:].norm() * factors.lora_A[start:].norm())


def assert_same_scores(left, right) -> None:
    assert set(left) == set(right)
    assert len(left) == 12
    for name, scores in left.items():
        torch.testing.assert_close(scores, right[name], rtol=1e-5, atol=0)
