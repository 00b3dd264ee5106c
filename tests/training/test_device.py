import pytest
import torch
from training_factories import CPU

from hafl_app.training.device import (
    autocast,
    describe_device,
    peak_memory_mb,
    reset_peak_memory,
    resolve_device,
    threads,
)


def test_auto_takes_cuda_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cpu") == CPU

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    with pytest.raises(ValueError, match="no CUDA device"):
        resolve_device("cuda")


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)],
)
def test_precision_on_the_cpu(precision, dtype):
    weight = torch.ones(3, 2)

    with autocast(CPU, precision):
        assert (weight @ weight.T).dtype == dtype


def test_threads_are_given_back_even_after_an_error():
    before = torch.get_num_threads()

    with pytest.raises(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError

    assert torch.get_num_threads() == before


def test_the_cpu_knows_its_kind_and_its_memory():
    reset_peak_memory(CPU)  # nothing to reset, and no error

    assert describe_device(CPU) == "cpu"
    # this process has torch loaded: between 50 MB and 1 TB, so the unit is right
    assert 50 < peak_memory_mb(CPU) < 1e6
