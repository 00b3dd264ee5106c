"""Training where memory is short: the same steps, in parts."""

import itertools
import math
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_factories import (
    SPEC,
    assert_same_adapter,
    plan_for,
    random_adapter,
    random_rows,
)

from hafl_app.lowrank.factors import Adapter
from hafl_app.plan_parts.tail_pruning import TailPruning
from hafl_app.training.batches import MicroBatches, is_out_of_memory
from hafl_app.training.classifier import LoraClassifier
from hafl_app.training.local import train
from hafl_app.training.settings import TrainOptions
from hafl_app.training.task import DeviceMemoryError, TrainResult

pytestmark = pytest.mark.slow

ROWS = random_rows(22)  # an epoch is four batches of five texts and one of two
SGD = TrainOptions(batch_size=5, optimizer="sgd", learning_rate=0.1, max_grad_norm=0.5)
CPU_MESSAGE = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 6400000000 bytes."


@pytest.fixture(scope="module")
def classifier() -> LoraClassifier:
    """Return one without dropout, whose masks a batch in parts would draw differently."""
    classifier = LoraClassifier(SPEC)
    for module in classifier.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return classifier


@pytest.fixture
def adapter(classifier) -> Adapter:
    return random_adapter(classifier, 5)


class Memory:
    """A device with room for so many texts at once; remembers how many it was given.

    It insists that what a failed part had computed is gone before the next one comes.
    """

    def __init__(self, monkeypatch, texts: int, error: Exception | None = None) -> None:
        self.error = error or torch.OutOfMemoryError("CUDA out of memory.")
        self.texts = texts
        self.seen: list[int] = []
        self.failures = 0
        self.computed: weakref.ref[torch.Tensor] | None = None
        forward = LoraClassifier.forward

        def limited(classifier, input_ids, attention_mask):
            assert self.computed is None or self.computed() is None
            if self.is_full(len(input_ids)):
                self.failures += 1
                activations = torch.ones(len(input_ids), 3)
                self.computed = weakref.ref(activations)
                raise type(self.error)(*self.error.args)
            self.seen.append(len(input_ids))
            return forward(classifier, input_ids, attention_mask)

        monkeypatch.setattr(LoraClassifier, "forward", limited)

    def is_full(self, texts: int) -> bool:
        return texts > self.texts


class TestMicroBatches:
    @given(rows=st.integers(1, 60), size=st.integers(1, 40))
    def test_parts_are_the_batch_in_order(self, rows, size):
        parts = MicroBatches(size).split(np.arange(rows))

        assert np.concatenate(parts).tolist() == list(range(rows))
        assert all(1 <= len(part) <= size for part in parts)

    @given(rows=st.integers(1, 60), size=st.integers(1, 40))
    def test_halving_ends_with_one_text(self, rows, size):
        micro_batches, sizes = MicroBatches(size), [min(rows, size)]
        while micro_batches.halve(rows):
            sizes.append(micro_batches.size)

        assert sizes[-1] == 1
        assert all(after == (before + 1) // 2 for before, after in itertools.pairwise(sizes))


class TestOutOfMemory:
    def test_of_torch_on_the_cpu(self):
        with pytest.raises(RuntimeError) as caught:
            torch.empty(1 << 60)  # beyond any address space: fails whatever memory there is
        assert is_out_of_memory(caught.value)

    def test_of_numpy(self):
        with pytest.raises(MemoryError) as caught:
            np.empty(1 << 60, dtype=np.uint8)
        assert is_out_of_memory(caught.value)

    def test_of_cuda(self):
        assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory."))
        assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))

    def test_of_onednn(self):
        assert is_out_of_memory(RuntimeError("could not create a primitive"))
        other = "could not create a primitive descriptor for a matmul primitive"
        assert not is_out_of_memory(RuntimeError(other))

    def test_nothing_else_is(self):
        assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        assert not is_out_of_memory(ValueError(CPU_MESSAGE))


class TestHalving:
    @pytest.mark.parametrize(
        "error",
        [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU_MESSAGE), MemoryError()],
        ids=["cuda", "cpu", "host"],
    )
    def test_trains_the_same_adapter(self, classifier, adapter, monkeypatch, error):
        plan = plan_for(adapter, (4, 1, 2), local_epochs=2)
        whole = train(classifier, adapter, plan, ROWS, SGD, seed=1)
        assert whole.micro_batch_size == 5

        memory = Memory(monkeypatch, texts=3, error=error)
        split = train(classifier, adapter, plan, ROWS, SGD, seed=1)

        # Batches of five in parts of three and two, which weigh differently; those of two whole.
        assert sorted(memory.seen) == sorted([3, 2] * 4 * 2 + [2] * 2)
        assert (split.micro_batch_size, split.steps, split.num_examples) == (3, whole.steps, 22)
        assert memory.failures == 1  # what was found is kept
        assert_close(split, whole)

    def test_goes_on_halving(self, classifier, adapter, monkeypatch):
        plan = plan_for(adapter)
        whole = train(classifier, adapter, plan, ROWS, SGD, seed=1)

        memory = Memory(monkeypatch, texts=1)
        split = train(classifier, adapter, plan, ROWS, SGD, seed=1)

        assert (split.micro_batch_size, split.steps) == (1, 5)
        assert memory.seen == [1] * 22
        assert_close(split, whole)

    def test_a_part_that_was_done_before_another_failed_counts_once(
        self, classifier, adapter, monkeypatch
    ):
        plan = plan_for(adapter, max_steps=1)
        options = replace(SGD, batch_size=11)
        whole = train(classifier, adapter, plan, ROWS, options, seed=1)

        class Filling(Memory):
            def is_full(self, texts):  # the first two parts of three fit, the third does not
                return texts > 3 or (texts == 3 and len(self.seen) == 2)

        memory = Filling(monkeypatch, texts=3)
        split = train(classifier, adapter, plan, ROWS, options, seed=1)

        assert memory.seen == [3, 3, 2, 2, 2, 2, 2, 1]
        assert split.micro_batch_size == 2
        assert_close(split, whole)

    def test_importance_is_that_of_the_whole_batch(self, classifier, adapter, monkeypatch):
        plan = plan_for(adapter, (4, 1, 2), importance="adalora")
        whole = train(classifier, adapter, plan, ROWS, SGD, seed=1)

        Memory(monkeypatch, texts=3)
        split = train(classifier, adapter, plan, ROWS, SGD, seed=1)

        assert_close(split, whole)

    def test_a_probe_is_halved_too(self, classifier, adapter, monkeypatch):
        plan = plan_for(adapter, (4, 1), importance="sensitivity", probe_batches=2)
        whole = train(classifier, adapter, plan, ROWS, SGD, seed=1)

        memory = Memory(monkeypatch, texts=2)
        split = train(classifier, adapter, plan, ROWS, SGD, seed=1)

        assert memory.failures == 2  # five, three: both in the probe
        assert split.micro_batch_size == 2
        assert_close(split, whole)

    def test_the_tail_is_pulled_once(self, classifier, adapter, monkeypatch):
        tail = TailPruning(decay=0.5, weight=0.5, min_rank=1, prune=False)
        plan = plan_for(adapter, tail=tail)
        whole = train(classifier, adapter, plan, ROWS, SGD, seed=1)

        Memory(monkeypatch, texts=2)
        split = train(classifier, adapter, plan, ROWS, SGD, seed=1)

        assert_close(split, whole)

    def test_nothing_changes_where_memory_suffices(self, classifier, adapter, monkeypatch):
        plan = plan_for(adapter, importance="smoothed")
        before = train(classifier, adapter, plan, ROWS, SGD, seed=1)

        memory = Memory(monkeypatch, texts=5)
        after = train(classifier, adapter, plan, ROWS, SGD, seed=1)

        assert memory.failures == 0
        assert_same_adapter(after.adapter, before.adapter)
        assert after.loss == before.loss


class TestTooLittle:
    def test_names_the_batch_the_rank_and_the_device(self, classifier, adapter, monkeypatch):
        Memory(monkeypatch, texts=0)

        with pytest.raises(DeviceMemoryError) as caught:
            train(classifier, adapter, plan_for(adapter, (4, 1)), ROWS, SGD, seed=1)

        assert str(caught.value) == (
            "cpu: out of memory with 1 text at a time of a batch of 5, at rank 5, of which 2 is "
            "trained"
        )

    def test_keeps_no_gradient_and_no_graph(self, classifier, adapter, monkeypatch):
        class Filling(Memory):
            def is_full(self, texts):  # one text fits, and the next one does not
                return texts > 1 or bool(self.seen)

        Filling(monkeypatch, texts=1)
        with pytest.raises(DeviceMemoryError) as caught:
            train(classifier, adapter, plan_for(adapter), ROWS, SGD, seed=1)

        assert caught.value.__context__ is None  # its traceback would keep the graph
        assert all(parameter.grad is None for parameter in classifier.parameters())

    def test_other_errors_are_not_answered_by_halving(self, classifier, adapter, monkeypatch):
        memory = Memory(monkeypatch, texts=0, error=RuntimeError("a broken kernel"))

        with pytest.raises(RuntimeError, match="a broken kernel"):
            train(classifier, adapter, plan_for(adapter), ROWS, SGD, seed=1)

        assert memory.failures == 1


LIMITED = """
import resource, sys
import torch
from training_factories import SPEC, plan_for, random_adapter, rows_of
from hafl_app.training.classifier import LoraClassifier
from hafl_app.training.local import train
from hafl_app.training.settings import TrainOptions

torch.set_num_threads(1)
classifier = LoraClassifier(SPEC)
adapter = random_adapter(classifier, 5)
plan = plan_for(adapter, max_steps=1)
few, many = (rows_of([[5] * 100] * n, [0, 1] * (n // 2)) for n in (2, 512))
train(classifier, adapter, plan, few, TrainOptions(batch_size=2), seed=1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 120_000_000, resource.RLIM_INFINITY))
result = train(classifier, adapter, plan, many, TrainOptions(batch_size=512), seed=1)
print(result.micro_batch_size, result.steps, result.loss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits its address space")
def test_a_process_that_may_not_have_more_memory_trains_in_parts():
    # The batch of 512 texts needs some 220 MB, where there are 120.
    folders = [str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parents[2])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], env=environment, capture_output=True, text=True, check=True
    )

    size, steps, loss = done.stdout.split()
    assert 1 <= int(size) < 512
    assert int(steps) == 1
    assert math.isfinite(float(loss))
    assert "texts at once" in done.stderr


def assert_close(split: TrainResult, whole: TrainResult) -> None:
    """Compare two trainings up to rounding; what the training moved is of size 0.01 to 1."""
    close = {"rtol": 1e-4, "atol": 2e-6}
    assert split.loss == pytest.approx(whole.loss, rel=1e-5)
    for name, factors in whole.adapter.modules.items():
        torch.testing.assert_close(split.adapter.modules[name].lora_A, factors.lora_A, **close)
        torch.testing.assert_close(split.adapter.modules[name].lora_B, factors.lora_B, **close)
    for name, tensor in whole.adapter.head.items():
        torch.testing.assert_close(split.adapter.head[name], tensor, **close)
    assert set(split.importance) == set(whole.importance)
    for name, scores in whole.importance.items():
        torch.testing.assert_close(split.importance[name], scores, rtol=2e-3, atol=1e-8)
