"""Tensors in a safetensors file, written from where they lie: no second copy of them in memory."""

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust ends the message of an error of the system


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors by name to a file, which replaces one of that name.

    Parameters
    ----------
    tensors
        Any layout; only those that `ready_to_write` has to copy take memory.
    metadata
        Text in the file's header.

    Raises
    ------
    OSError
        If it cannot be written, with the file's name.
    safetensors.SafetensorError
        If the format has no place for the content.
    """
    try:
        save_file(ready_to_write(tensors), path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        if (found := _OS_ERROR.search(str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def ready_to_write(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them: on the CPU, contiguous, none sharing memory.

    Those that are so already are returned as they are, not copied.
    """
    here = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    # Slices of one adapter share its memory, which safetensors refuses.
    owners = Counter(tensor.untyped_storage().data_ptr() for tensor in here.values())
    return {
        name: tensor
        if owners[tensor.untyped_storage().data_ptr()] == 1 and _lies_in_order(tensor)
        else tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in here.items()
    }


def _lies_in_order(tensor: Tensor) -> bool:
    # Of one number any stride counts as contiguous, also 0, by which its bytes cannot be read.
    return tensor.is_contiguous() and tensor.reshape(-1).stride(0) == 1
