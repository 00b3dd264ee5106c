"""Tensors in a file: written without copies, and a full disk named."""

import errno
import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hafl_app.training import tensor_files
from hafl_app.training.tensor_files import ready_to_write, write_tensors


@contextmanager
def room_for(size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_can_be_written_as_it_lies_is_not_copied():
    whole = torch.arange(12.0).reshape(4, 3)
    own = {"grown": torch.ones(2, 3, requires_grad=True), "part": whole[1:3]}

    ready = ready_to_write(own)

    assert {n: t.data_ptr() for n, t in ready.items()} == {n: t.data_ptr() for n, t in own.items()}
    assert not any(tensor.requires_grad for tensor in ready.values())


def test_what_shares_memory_or_lies_across_is_copied(tmp_path):
    whole = torch.arange(12.0).reshape(4, 3)
    tensors = {"upper": whole[:3], "lower": whole[1:], "across": torch.rand(5, 2).T}

    write_tensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})

    read = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_one_number_without_a_stride_has_its_bytes():
    (ready,) = ready_to_write({"repeated": torch.tensor(3).expand(1)}).values()
    assert ready.reshape(-1).view(torch.uint8).tolist() == [3, 0, 0, 0, 0, 0, 0, 0]


def test_a_full_disk_is_an_error_of_the_system_with_the_files_name(tmp_path):
    path = tmp_path / "x.safetensors"
    with room_for(300), pytest.raises(OSError, match="too large") as caught:
        write_tensors(path, {"w": torch.ones(1000)})

    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert not path.exists()


def test_what_is_no_error_of_the_system_stays_what_it_is(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise SafetensorError("invalid header")

    monkeypatch.setattr(tensor_files, "save_file", refuse)
    with pytest.raises(SafetensorError, match="invalid header"):
        write_tensors(tmp_path / "x.safetensors", {})
