import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import gpu
from benchmarks.gpu import (
    NOT_MEASURED,
    OUT_OF_MEMORY,
    SMOKE,
    WAYS,
    Load,
    flops,
    make_client,
    measure,
    row,
    unmeasured,
    with_texts,
)
from benchmarks.training import OURS, TRAINER, Case
from programs import run_program
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
SMALL = {**SMOKE, "num_hidden_layers": 1, "vocab_size": 96}
LOAD = Load(rank=3, batch_size=2, length=7)


@pytest.fixture(scope="module")
def client():
    return make_client(SMALL, CPU)


def test_needs_neither_flower_nor_ray_nor_hydra():
    names = ["flwr", "flwr_datasets", "ray", "hydra", "omegaconf", "wandb"]
    code = (
        "import sys, benchmarks.timing, benchmarks.gpu; "
        f"print([name for name in {names} if name in sys.modules])"
    )

    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    # Transformers prints a line of its own where Weights & Biases is offline.
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_all_ways_are_timed_after_all_have_the_same_gradients(client):
    gpu.check(SMALL, CPU, [3])

    steps = measure(client, LOAD, steps=1, repeats=1)

    assert list(steps) == list(WAYS) == [OURS, TRAINER]
    for way, step in steps.items():
        cells = row(LOAD, step, way, limit=1e9, work=1e6)
        assert cells["rank"] == 3
        assert cells["batch x tokens"] == "2 x 7"
        assert float(cells["tokens/s"]) > 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_way_that_runs_out_of_memory_says_so_and_the_others_go_on(client, error, monkeypatch):
    right = gpu.job

    def job(client, case, way):
        if way == TRAINER:
            raise error
        return right(client, case, way)

    monkeypatch.setattr(gpu, "job", job)

    steps = measure(client, LOAD, steps=1, repeats=1)

    assert steps[OURS].timing is not None
    assert row(LOAD, steps[TRAINER], TRAINER, 1e9, 1e6)["tokens/s"] == OUT_OF_MEMORY


def test_another_error_is_not_taken_for_a_lack_of_memory(client, monkeypatch):
    def job(client, case, way):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(gpu, "job", job)

    with pytest.raises(RuntimeError, match="mat1"):
        measure(client, LOAD, steps=1, repeats=1)


def test_operations_are_those_of_the_products_of_a_step(client):
    case = Case(LOAD.rank, LOAD.rank)
    ready = with_texts(client, LOAD, 1)
    ready.model.load(case.adapter(ready.model), case.plan(ready.model))
    batch = ready.model.batch(ready.texts, np.arange(2))

    def in_place(_, left, right, **options):
        return 2 * left[0] * left[1] * right[1]

    mapping = {torch.ops.aten.addmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        ready.model.loss(batch).backward()

    # The lowest layer's inputs need no gradients, and the kernels take attention as not causal.
    assert flops(ready, LOAD) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_without_a_device_every_line_says_so():
    rows = unmeasured([LOAD, Load(2, 1, 9)])

    assert [line["way"] for line in rows] == [*WAYS, *WAYS]
    assert {line["ms a step"] for line in rows} == {NOT_MEASURED}
    assert rows[-1]["batch x tokens"] == "1 x 9"


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure the CUDA device")
def test_the_script_says_where_there_is_no_device():
    done = run_program("scripts/bench_gpu.py")

    assert done.returncode == 0, done.stderr
    assert "no CUDA device: nothing is measured" in done.stdout.splitlines()
    assert "| 8 x 2048 | ours | not measured |" in done.stdout


def test_the_script_measures_in_small_on_the_cpu(tmp_path):
    file = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--tiny", "--steps", "1", "--repeats", "1", "--json", str(file)]

    done = run_program("scripts/bench_gpu.py", *options, "--loads", "3:2x7")

    assert done.returncode == 0, done.stderr
    assert "| 3 | 2 x 7 | ours |" in done.stdout
    assert {step["way"] for step in json.loads(file.read_text())["steps"]} == set(WAYS)
