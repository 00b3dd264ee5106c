import pytest
import torch
from benchmarks import gpu
from benchmarks.cohort import ONE_AT_A_TIME, check, measure, rows, shares_of, tasks_of
from benchmarks.timing import DisagreementError
from benchmarks.training import make_client
from programs import run_program

from hafl_app.training import cohort_lora
from hafl_app.training.settings import TrainOptions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client():
    return make_client(None, 2 * 3, TrainOptions(batch_size=3))


@pytest.fixture(scope="module")
def tasks(client):
    return tasks_of(client, shares_of(client.texts, 3), 2)


def test_all_sizes_are_timed_after_all_clients_train_as_alone(client, tasks):
    check(client, tasks)

    timings = measure(client, tasks, (1, 3), 1)

    assert list(timings) == [ONE_AT_A_TIME, "1", "3"]
    lines = rows(timings, batch=3)
    assert [line["cohort"] for line in lines] == [ONE_AT_A_TIME, "1", "3"]
    assert lines[0]["times as fast"] == "1.00"


def test_clients_that_get_each_others_gradients_are_never_timed(client, tasks, monkeypatch):
    shares = cohort_lora._Stacked.shares

    def mixed_up(self, gradients, needed):
        return shares(self, [None if g is None else g.flip(0) for g in gradients], needed)

    monkeypatch.setattr(cohort_lora._Stacked, "shares", mixed_up)
    with pytest.raises(DisagreementError, match="of 3 together"):
        check(client, tasks)


def test_every_text_is_in_one_share(client):
    shares = shares_of(client.texts, 3)

    assert [len(share.labels) for share in shares] == [6, 6, 6]
    assert [t for share in shares for t in share.tokens] == list(client.texts.tokens)
    assert all(share.offsets[0] == 0 for share in shares)


def test_the_script_says_that_there_is_no_device():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run_program("scripts/bench_cohort.py", "--device", "cuda")
    assert done.returncode == 0
    assert "| 8 | 64 | not measured |" in done.stdout


def test_language_models_on_a_gpu_are_measured_likewise():
    small = gpu.make_client({**gpu.SMOKE, "num_hidden_layers": 1}, torch.device("cpu"))
    timings = gpu.measure_cohorts(small, gpu.Load(2, 2, 5), (1, 2), steps=1, repeats=1)
    assert list(timings) == [ONE_AT_A_TIME, "1", "2"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_small_clients_on_a_gpu_are_faster_together():
    device = torch.device("cuda")
    client = gpu.make_client({**gpu.TINY_LLAMA, "num_hidden_layers": 4}, device)
    timings = gpu.measure_cohorts(client, gpu.Load(8, 8, 32), (16,), steps=3, repeats=3)
    # Goal: 5 times. Not yet measured on any device.
    assert timings[ONE_AT_A_TIME].median > 2 * timings["16"].median
