import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from training_factories import CPU, SPEC, plan_for, random_adapter, rows_of
from transformers import BertConfig

from hafl_app.training import step_memory as memory
from hafl_app.training.classifier import ClassifierSpec, LoraClassifier
from hafl_app.training.device import peak_memory_mb
from hafl_app.training.local import train
from hafl_app.training.settings import BaseSpec, TrainOptions
from hafl_app.training.step_memory import LiveBytes, StepBytes, StepMemory, count_step, step_memory

pytestmark = pytest.mark.slow

BATCH, LENGTH, HELD = 6, 11, 8
OPTIONS = TrainOptions(batch_size=BATCH)
# One text alone is shorter, so that in its batch there is something to mask.
ROWS = rows_of([[5] * (LENGTH - (i == 0)) for i in range(3 * BATCH)], [0, 1, 2] * BATCH)
MEGABYTE = 1e6


def folder_with(tmp_path, **settings):
    """Return a folder with nothing but a configuration, as little as a weightless count needs."""
    config = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3}
    BertConfig(**(config | {"num_hidden_layers": 2} | settings)).save_pretrained(tmp_path)
    return ClassifierSpec(BaseSpec(str(tmp_path)), num_labels=5)


def trained_bytes(rank, options):
    """Return the peak bytes of what a whole real training allocates, its weights left out."""
    classifier = LoraClassifier(SPEC)
    classifier.hold_weights(options.precision)
    adapter = random_adapter(classifier, HELD)
    plan = plan_for(adapter, range(rank), importance="smoothed")
    with LiveBytes() as live:
        train(classifier, adapter, plan, ROWS, options, seed=1)
    return live.peak


class TestCount:
    @pytest.mark.parametrize("rank", [1, 3, HELD])
    @pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
    @pytest.mark.parametrize(("precision", "close"), [("fp32", 0.03), ("bf16", 0.05)])
    def test_is_what_a_real_training_allocates(self, rank, optimizer, precision, close):
        options = replace(OPTIONS, optimizer=optimizer, precision=precision)

        counted = count_step(SPEC, rank, HELD, options, LENGTH, CPU)

        assert counted.peak - counted.weights == pytest.approx(
            trained_bytes(rank, options), rel=close
        )

    def test_rounded_weights_take_half_the_bytes(self):
        whole, rounded = (
            count_step(SPEC, 2, HELD, replace(OPTIONS, precision=p), LENGTH, CPU)
            for p in ("fp32", "bf16")
        )

        assert rounded.weights * 2 == whole.weights
        assert rounded.peak < whole.peak - rounded.weights

    def test_adamw_takes_two_numbers_more_for_each_trained_one(self):
        # The tiny batch's peak is where the optimizer steps; moments are there in any case.
        shapes = LoraClassifier(SPEC).shapes().values()
        numbers = HELD * sum(s.in_features + s.out_features for s in shapes)
        peaks = [
            count_step(SPEC, HELD, HELD, replace(OPTIONS, optimizer=o), LENGTH, CPU).peak
            for o in ("adamw", "sgd")
        ]

        assert peaks[0] - peaks[1] >= 2 * 4 * numbers

    @pytest.mark.parametrize("factors", ["A", "B"])
    def test_a_factor_alone_takes_neither_gradients_nor_moments_for_the_other(self, factors):
        shapes = LoraClassifier(SPEC).shapes().values()
        stays = sum(s.out_features if factors == "A" else s.in_features for s in shapes)

        both = count_step(SPEC, HELD, HELD, OPTIONS, LENGTH, CPU)
        one = count_step(SPEC, HELD, HELD, OPTIONS, LENGTH, CPU, factors)

        assert one.weights == both.weights
        assert both.peak - one.peak >= 3 * 4 * HELD * stays

    def test_texts_and_their_length_count(self):
        one, wider, longer = (
            count_step(SPEC, 2, HELD, TrainOptions(batch_size=batch), length, CPU)
            for batch, length in ((8, 16), (16, 16), (8, 32))
        )

        assert one.weights == wider.weights == longer.weights
        assert wider.peak - one.peak > 0.6 * (one.peak - one.weights)
        assert longer.peak > wider.peak  # attention grows with the square of the length

    def test_texts_are_no_longer_than_the_model_reads(self):
        # the tiny model has 128 positions
        assert count_step(SPEC, 2, 2, OPTIONS, 4000, CPU) == count_step(
            SPEC, 2, 2, OPTIONS, 128, CPU
        )

    def test_half_precision_files_are_trained_in_float32(self, tmp_path):
        halves = folder_with(tmp_path / "half", dtype="float16")
        whole = folder_with(tmp_path / "whole", dtype="float32")

        counts = [count_step(spec, 2, 3, OPTIONS, LENGTH, CPU) for spec in (halves, whole)]

        assert counts[0] == counts[1]

    def test_a_large_model_is_counted_without_its_memory(self, tmp_path):
        spec = folder_with(
            tmp_path, hidden_size=4096, intermediate_size=9000, num_attention_heads=32
        )
        before = peak_memory_mb(CPU)

        counted = count_step(spec, 2, 3, OPTIONS, LENGTH, CPU)

        grown = peak_memory_mb(CPU) - before
        assert counted.weights > 1000 * MEGABYTE
        assert grown < 150

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("rank", [1, 4, 16])
    def test_on_cuda_it_is_what_the_allocator_says(self, tmp_path, rank):
        spec = folder_with(tmp_path, hidden_size=384, intermediate_size=1536)
        cuda, options = torch.device("cuda"), TrainOptions(batch_size=32)
        random = replace(spec, base=replace(spec.base, random_weights=True))
        classifier = LoraClassifier(random).float().to(cuda)
        adapter = random_adapter(classifier, 16)
        plan = plan_for(adapter, range(rank), importance="smoothed")
        rows = rows_of([[5] * (64 - (i % 3 == 0)) for i in range(64)], [0, 1] * 32)

        result = train(classifier, adapter, plan, rows, options, seed=1)

        counted = count_step(random, rank, 16, options, 64, cuda)
        assert counted.peak / MEGABYTE == pytest.approx(result.peak_memory_mb, rel=0.15)


class TestStepMemory:
    def test_is_close_to_the_count_at_every_rank_between(self):
        step = step_memory(SPEC, 12, OPTIONS, LENGTH, CPU)

        for rank in (2, 7, 11):
            counted = count_step(SPEC, rank, 12, OPTIONS, LENGTH, CPU).peak
            assert step.tensors_mb(rank) == pytest.approx(counted / MEGABYTE, rel=0.02)
        assert step.tensors_mb(12) > 1.2 * step.tensors_mb(1)

    def test_the_largest_rank_is_the_last_that_fits(self):
        step = StepMemory(
            "cpu", weights=90 * 10**6, lowest=500 * 10**6, highest=941 * 10**6, max_rank=64
        )
        needed = [step.needed_mb(rank) for rank in range(1, 65)]

        assert needed == sorted(needed)
        assert step.largest_rank(needed[0] - 0.1) == 0
        assert [step.largest_rank(mb + 0.1) for mb in needed] == list(range(1, 65))
        assert step.largest_rank(1e9) == 64

    def test_an_adapter_of_rank_one_has_one_rank(self):
        step = step_memory(SPEC, 1, OPTIONS, LENGTH, CPU)

        assert step.lowest == step.highest
        assert step.largest_rank(1e9) == 1

    def test_the_cpu_counts_the_whole_process(self):
        step = step_memory(SPEC, 4, OPTIONS, LENGTH, CPU)

        assert step.tensors_mb(4) < 5  # a tiny model
        assert 400 < step.needed_mb(4) < 1000  # in a process with torch and transformers

    def test_a_process_that_trains_stays_below_it(self, tmp_path):
        spec = folder_with(tmp_path, hidden_size=384, intermediate_size=1536, num_hidden_layers=4)
        spec = replace(spec, base=replace(spec.base, random_weights=True))
        needed = step_memory(spec, 8, TrainOptions(batch_size=16), 64, CPU).needed_mb(8)

        peak = float(subprocess.check_output([sys.executable, "-c", _TRAIN, str(tmp_path)]))

        assert 0.5 * needed < peak < needed


_TRAIN = """
import sys
sys.path[:0] = ["tests/helpers", "."]
import hafl_app.client.handlers
from training_factories import plan_for, random_adapter, rows_of
from hafl_app.training.settings import BaseSpec
from hafl_app.training.classifier import ClassifierSpec, LoraClassifier
from hafl_app.training.device import peak_memory_mb
from hafl_app.training.local import train
from hafl_app.training.settings import TrainOptions
classifier = LoraClassifier(ClassifierSpec(BaseSpec(sys.argv[1], random_weights=True), 5)).float()
adapter = random_adapter(classifier, 8)
rows = rows_of([[5] * (64 - (i % 3 == 0)) for i in range(64)], [0, 1] * 32)
plan = plan_for(adapter, importance="smoothed")
adapter = adapter.map(lambda f: type(f)(f.lora_A / 100, f.lora_B / 100))
train(classifier, adapter, plan, rows, TrainOptions(batch_size=16), 1)
print(peak_memory_mb(classifier.device))
"""


class TestCache:
    def test_a_count_is_kept(self, tmp_path, monkeypatch):
        first = step_memory(SPEC, 5, OPTIONS, LENGTH, CPU, tmp_path)
        monkeypatch.setattr(memory, "count_step", None)  # would raise if it were called

        assert step_memory(SPEC, 5, OPTIONS, LENGTH, CPU, tmp_path) == first
        assert [path.suffix for path in tmp_path.iterdir()] == [".json"]

    @pytest.mark.parametrize(
        "change", ["rank", "batch", "length", "model", "precision", "optimizer"]
    )
    def test_whatever_it_depends_on_is_counted_anew(self, tmp_path, monkeypatch, change):
        step_memory(SPEC, 5, OPTIONS, LENGTH, CPU, tmp_path)
        options = {
            "batch": replace(OPTIONS, batch_size=BATCH + 1),
            "precision": replace(OPTIONS, precision="bf16"),
            "optimizer": replace(OPTIONS, optimizer="sgd"),
        }
        model = replace(SPEC, base=replace(SPEC.base, num_layers=1))
        monkeypatch.setattr(memory, "count_step", None)

        with pytest.raises(TypeError):
            step_memory(
                model if change == "model" else SPEC,
                6 if change == "rank" else 5,
                options.get(change, OPTIONS),
                LENGTH + (change == "length"),
                CPU,
                tmp_path,
            )

    def test_another_configuration_under_the_same_name_is_counted_anew(self, tmp_path):
        spec = folder_with(tmp_path / "model")
        first = step_memory(spec, 3, OPTIONS, LENGTH, CPU, tmp_path / "kept")

        folder_with(tmp_path / "model", num_hidden_layers=3)

        assert step_memory(spec, 3, OPTIONS, LENGTH, CPU, tmp_path / "kept").weights > first.weights

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"weights": 1}', "null"])
    def test_a_broken_file_is_replaced(self, tmp_path, monkeypatch, text):
        counted = StepBytes(weights=70, peak=900)
        monkeypatch.setattr(memory, "count_step", lambda *_: counted)
        first = step_memory(SPEC, 2, OPTIONS, LENGTH, CPU, tmp_path)
        (file,) = tmp_path.iterdir()
        file.write_text(text)

        assert step_memory(SPEC, 2, OPTIONS, LENGTH, CPU, tmp_path) == first
        assert StepMemory(**json.loads(file.read_text())) == first


def test_freed_tensors_are_no_longer_counted():
    with LiveBytes() as live:
        kept = torch.ones(3, 5)
        passing = kept + 1
        view = passing.T  # no memory of its own
        del passing
        assert live.live == 2 * 60
        del view

        assert live.live == 60
        assert live.peak == 120
