"""Clients that train together in one model: the same results as one at a time."""

import time
from dataclasses import replace

import pytest
import torch
from causal_factories import CAUSAL, random_pairs
from peft.tuners.lora import Linear
from training_factories import (
    SPEC,
    assert_same_adapter,
    plan_for,
    random_adapter,
    random_rows,
    rows_of,
)
from vision_factories import SPEC as IMAGES
from vision_factories import random_images

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.plan_parts.alignment import Alignment
from hafl_app.plan_parts.component_choice import ComponentChoice
from hafl_app.plan_parts.tail_pruning import TailPruning
from hafl_app.training import cohort, cohort_choice
from hafl_app.training.cohort import obstacle, obstacle_of, train_cohort
from hafl_app.training.cohort_choice import choose, differ, steps_of, too_short
from hafl_app.training.local import train
from hafl_app.training.lora_model import LoraModel
from hafl_app.training.settings import TrainOptions
from hafl_app.training.task import Task

OPTIONS = TrainOptions(batch_size=4, learning_rate=1e-2, max_grad_norm=0.5)
KINDS = {
    "encoder": (SPEC, random_rows),
    "causal": (CAUSAL, random_pairs),
    "vision": (IMAGES, random_images),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """Return a model of every kind, and what makes its rows."""
    spec, rows = KINDS[request.param]
    return spec.build(), rows


@pytest.fixture(scope="module")
def classifier():
    return SPEC.build()


def mixed_tasks(model: LoraModel, rows, options: TrainOptions = OPTIONS) -> list[Task]:
    """Return clients of different ranks, scalings, data and steps, some with frozen components."""
    whole = random_adapter(model, 3, seed=1)
    few = random_adapter(model, lambda name: 1 + len(name) % 2, seed=2)
    wide = random_adapter(model, 5, seed=3)
    near = {"scaling": 0.5, "proximal": 2.0, "rates": (0.3, 1.0, 0.1)}
    plans = (
        (whole, plan_for(whole, max_steps=5, importance="adalora")),
        (few, plan_for(few, max_steps=2, scaling=2.0, importance="sensitivity")),
        (wide, plan_for(wide, (4, 1), local_epochs=2, importance="smoothed", **near)),
        (wide, plan_for(wide, (2,), head="frozen", importance="adalora", probe_batches=2)),
        (whole, plan_for(whole, local_epochs=3, max_steps=5, tail=TailPruning(0.5, 0.1, 1))),
    )
    # Last batches are of one row and of three; a batch goes with others of as many rows.
    numbers = (21, 9, 8, 7, 5)
    tasks = [
        Task(adapter, plan, rows(number, seed=number), options, seed=number)
        for (adapter, plan), number in zip(plans, numbers, strict=True)
    ]
    tasks[0] = replace(tasks[0], correction=random_adapter(model, 3, seed=4))
    return tasks


def wide_pixels(task: Task) -> Task:
    """Return a task with images in float64, which texts are not."""
    if not hasattr(task.examples, "pixels"):
        return task
    images = replace(task.examples, pixels=task.examples.pixels.astype("float64"))
    return replace(task, examples=images)


def alone(model: LoraModel, task: Task):
    return train(
        *(model, task.adapter, task.plan, task.examples, task.options, task.seed),
        correction=task.correction,
    )


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


def assert_all_same(model: LoraModel, tasks: list[Task], rtol: float, atol: float) -> None:
    for task, joint in zip(tasks, train_cohort(model, tasks), strict=True):
        assert_same(joint, alone(model, task), rtol, atol)


class TestPlansOfFewMethods:
    """Clients that choose their components, amplify or rotate them, beside a plain one."""

    def test_are_executed_as_they_are_alone(self, classifier):
        whole = random_adapter(classifier, 3, seed=1)
        plain = plan_for(whole, max_steps=3)
        amplified = {n: replace(m, gain=3.0) for n, m in plain.modules.items()}
        budgets = {n: replace(m, budget=1, factors="B") for n, m in plain.modules.items()}
        rule = ComponentChoice("contribution", "model", probe_steps=2)
        plans = (
            replace(plain, modules=budgets, choice=rule),
            replace(plain, modules=amplified),
            replace(plain, align=Alignment("B")),
            plain,
        )
        tasks = [
            Task(whole, plan, random_rows(8, seed=number), OPTIONS, seed=number)
            for number, plan in enumerate(plans)
        ]

        together = train_cohort(classifier, tasks)

        for task, joint in zip(tasks, together, strict=True):
            single = alone(classifier, task)
            assert joint.plan == single.plan
            assert_same(joint, single, rtol=1e-3, atol=1e-4)
        trained = {len(m.trainable) for m in together[0].plan.modules.values()}
        assert len(trained) > 1  # over the model, so not one in every module


class TestSameAsAlone:
    def test_in_float64(self, kind):
        model, rows = kind
        model.double()
        try:
            tasks = [wide_pixels(task) for task in mixed_tasks(model, rows)]
            assert_all_same(model, tasks, rtol=0, atol=1e-9)
        finally:
            model.float()

    def test_in_float32(self, kind):
        model, rows = kind
        # Adam divides a gradient by its own size, however close to rounding that is.
        tasks = mixed_tasks(model, rows, replace(OPTIONS, learning_rate=1e-3))
        assert_all_same(model, tasks, rtol=1e-4, atol=1e-4)

    def test_with_bf16_autocast(self, classifier):
        options = replace(OPTIONS, precision="bf16", learning_rate=1e-3)
        assert_all_same(classifier, mixed_tasks(classifier, random_rows, options), 0.05, 0.01)

    def test_on_a_quantized_base(self):
        model = replace(SPEC, base=replace(SPEC.base, quantization="bf16")).build()
        tasks = mixed_tasks(model, random_rows, replace(OPTIONS, learning_rate=1e-3))
        assert_all_same(model, tasks, rtol=1e-4, atol=1e-4)

    def test_with_activations_computed_again(self, classifier):
        options = replace(OPTIONS, gradient_checkpointing=True, learning_rate=1e-3)
        tasks = mixed_tasks(classifier, random_rows, options)
        assert_all_same(classifier, tasks, rtol=1e-4, atol=1e-4)

    def test_the_base_models_own_head(self):
        model = replace(SPEC, base=replace(SPEC.base, pooling="cls")).build()
        tasks = mixed_tasks(model, random_rows, replace(OPTIONS, learning_rate=1e-3))
        assert_all_same(model, tasks, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("factors", ["A", "B"])
    def test_one_factor_alone(self, classifier, factors):
        tasks = mixed_tasks(classifier, random_rows, replace(OPTIONS, optimizer="sgd"))[1:4]
        modules = {name: replace(m, factors=factors) for name, m in tasks[1].plan.modules.items()}
        tasks[1] = replace(tasks[1], plan=replace(tasks[1].plan, modules=modules))
        assert_all_same(classifier, tasks, rtol=1e-4, atol=1e-5)

    def test_seconds_add_up_to_those_of_the_cohort(self, classifier):
        tasks = mixed_tasks(classifier, random_rows)
        started = time.perf_counter()
        joint = train_cohort(classifier, tasks)
        took = time.perf_counter() - started

        assert all(result.seconds > result.probe_seconds >= 0 for result in joint)
        assert joint[3].probe_seconds > 0
        assert 0.5 * took < sum(result.seconds for result in joint) <= took

    def test_the_model_serves_one_client_afterwards(self, classifier):
        task = mixed_tasks(classifier, random_rows)[0]
        before = alone(classifier, task)
        train_cohort(classifier, mixed_tasks(classifier, random_rows))
        assert_same_adapter(alone(classifier, task).adapter, before.adapter)


class TestPasses:
    """How many rows go through the base model at once."""

    @pytest.fixture
    def passes(self, monkeypatch):
        seen = []
        read = cohort.Cohort.reading

        def reading(self, clients):
            seen.append(len(clients))
            return read(self, clients)

        monkeypatch.setattr(cohort.Cohort, "reading", reading)
        return seen

    @staticmethod
    def equal_tasks(classifier, number, rows=12):
        adapter = random_adapter(classifier, 2)
        plan = plan_for(adapter)
        return [
            Task(adapter, plan, rows_of([[5 + n] * 6] * rows, [0, 1] * (rows // 2)), OPTIONS, n)
            for n in range(number)
        ]

    def test_one_pass_serves_all(self, classifier, passes):
        train_cohort(classifier, self.equal_tasks(classifier, 6))
        assert passes == [6] * 3

    def test_a_client_with_fewer_steps_leaves(self, classifier, passes):
        tasks = self.equal_tasks(classifier, 3)
        tasks[1] = replace(tasks[1], plan=replace(tasks[1].plan, max_steps=1))
        train_cohort(classifier, tasks)
        assert passes == [3, 2, 2]

    def test_no_more_tokens_at_once_than_pay(self, classifier, passes, monkeypatch):
        monkeypatch.setitem(cohort._TOKENS_AT_ONCE, "cpu", 2 * 4 * 6)
        train_cohort(classifier, self.equal_tasks(classifier, 5))
        assert passes == [2, 2, 1] * 3

    def test_short_texts_are_not_padded_to_long_ones(self, classifier, passes):
        tasks = self.equal_tasks(classifier, 4)
        long = rows_of([[5] * 60] * 12, [0, 1] * 6)
        tasks[2] = replace(tasks[2], examples=long)
        train_cohort(classifier, tasks)
        assert sorted(passes) == [1] * 3 + [3] * 3

    def test_out_of_memory_goes_on_with_fewer(self, classifier, passes, monkeypatch, caplog):
        tasks = self.equal_tasks(classifier, 4)
        expected = [alone(classifier, task) for task in tasks]
        predictions = type(classifier).predictions

        def filling(model, batch):
            if len(batch.labels) > 8:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return predictions(model, batch)

        monkeypatch.setattr(type(classifier), "predictions", filling)
        monkeypatch.setitem(cohort._TOKENS_AT_ONCE, "cpu", 4 * 4 * 6)
        for joint, single in zip(train_cohort(classifier, tasks), expected, strict=True):
            assert_same(joint, single, rtol=1e-3, atol=1e-3)
        assert passes == [4] + [2, 2] * 3

    def test_a_client_that_does_not_fit_alone_is_left_out(self, classifier, monkeypatch):
        def full(model, batch):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(type(classifier), "predictions", full)
        assert train_cohort(classifier, self.equal_tasks(classifier, 3)) == [None] * 3
        assert all(parameter.grad is None for parameter in classifier.parameters())


class TestFailures:
    def test_a_loss_that_is_not_finite_leaves_the_others_alone(self, classifier):
        tasks = mixed_tasks(classifier, random_rows)[:3]
        broken = tasks[1].adapter.map(lambda f: LoraFactors(f.lora_A * 1e30, f.lora_B * 1e30))
        tasks[1] = replace(tasks[1], adapter=broken)

        first, second, third = train_cohort(classifier, tasks)

        assert second is None
        for task, joint in ((tasks[0], first), (tasks[2], third)):
            assert_same(joint, alone(classifier, task), rtol=1e-3, atol=1e-3)

    def test_an_adapter_of_another_model_leaves_the_others_alone(self, classifier):
        tasks = mixed_tasks(classifier, random_rows)[:3]
        tasks[0] = replace(tasks[0], adapter=replace(tasks[0].adapter, modules={}))
        first, *others = train_cohort(classifier, tasks)
        assert first is None
        assert None not in others

    def test_an_error_of_the_pass_itself_is_raised_and_the_model_restored(
        self, classifier, monkeypatch
    ):
        def broken(model, batch):
            raise RuntimeError("a broken kernel")

        tasks = mixed_tasks(classifier, random_rows)
        with monkeypatch.context() as patch:
            patch.setattr(type(classifier), "predictions", broken)
            with pytest.raises(RuntimeError, match="a broken kernel"):
                train_cohort(classifier, tasks)
        assert alone(classifier, tasks[0]).steps == 5


class TestObstacles:
    def test_a_model_without_dropout_has_none(self, kind):
        assert obstacle_of(kind[0]) is None
        assert obstacle(OPTIONS) is None

    @pytest.mark.parametrize(
        ("spec", "name"),
        [
            (replace(SPEC, lora_dropout=0.1), "lora.lora_dropout"),
            (replace(SPEC, base=replace(SPEC.base, dropout=True)), "model.dropout"),
        ],
    )
    def test_dropout_is_one(self, spec, name):
        assert obstacle_of(spec.build()).startswith(name)

    def test_rates_that_only_the_configuration_has_are_one(self, classifier, monkeypatch):
        monkeypatch.setattr(classifier.base.config, "attention_probs_dropout_prob", 0.1)
        assert "model.dropout" in obstacle_of(classifier)

    def test_batch_norm_is_one(self):
        model = SPEC.build()
        model.base.norm = torch.nn.BatchNorm1d(3)
        assert "batch norm" in obstacle_of(model)

    def test_layers_that_are_not_linear_are_one(self):
        model = SPEC.build()
        next(iter(model.layers.values())).__class__ = Linear
        assert obstacle_of(model).startswith("lora.target_modules")

    @pytest.mark.parametrize(
        ("options", "name"),
        [({"max_seconds": 5.0}, "client.max_seconds=5"), ({"micro_batch_size": 2}, "micro_batch")],
    )
    def test_limits_of_a_client_are_one(self, options, name):
        assert name in obstacle(replace(OPTIONS, **options))


class TestChoice:
    @pytest.mark.parametrize(("together", "clients"), [(0.5, 16), (0.99, 1)])
    def test_it_follows_the_measurement(self, classifier, monkeypatch, together, clients):
        monkeypatch.setattr(cohort_choice, "_seconds", lambda *_: (1.0, together))
        choice = choose(classifier, mixed_tasks(classifier, random_rows))
        assert choice.clients == clients
        assert choice.speedup == pytest.approx(1 / together, abs=0.01)

    def test_a_short_run_is_not_measured(self):
        cpu = torch.device("cpu")
        assert "1,000 steps" in too_short(cpu, 1000)
        assert too_short(cpu, 5000) == ""

    @pytest.mark.parametrize(("max_steps", "steps"), [(0, 6), (5, 5), (9, 6)])
    def test_the_steps_of_a_client_are_known_before(self, classifier, max_steps, steps):
        adapter = random_adapter(classifier, 2, seed=1)
        plan = plan_for(adapter, local_epochs=2, max_steps=max_steps)
        task = Task(adapter, plan, random_rows(9, seed=1), OPTIONS, seed=0)
        assert steps_of(task) == steps == alone(classifier, task).steps

    def test_equal_results_do_not_differ(self, classifier):
        assert differ(classifier, mixed_tasks(classifier, random_rows)) == ""

    def test_a_model_that_mixes_up_rows_is_found_out(self, classifier, monkeypatch):
        predictions = type(classifier).predictions

        def turned(model, batch):
            logits, targets = predictions(model, batch)
            return logits.flip(0), targets

        monkeypatch.setattr(type(classifier), "predictions", turned)
        assert "together" in differ(classifier, mixed_tasks(classifier, random_rows))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_cuda(precision):
    model = SPEC.build().to("cuda")
    options = replace(OPTIONS, precision=precision, learning_rate=1e-3)
    close = (1e-3, 1e-3) if precision == "fp32" else (0.05, 0.02)
    assert_all_same(model, mixed_tasks(model, random_rows, options), *close)
