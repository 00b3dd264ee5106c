"""The device to train on, its precision, and how many threads its arithmetic may use."""

import contextlib
import resource
import sys
from collections.abc import Iterator

import torch


def resolve_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu`` or ``cuda``.

    Raises
    ------
    ValueError
        If CUDA is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("client.device=cuda, but no CUDA device is available")
    return torch.device(name)


def describe_device(device: torch.device) -> str:
    """Return the kind of a device, and on CUDA its name."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return device.type


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context for ``auto``, ``fp32`` or ``bf16``; auto is bf16 on CUDA."""
    enabled = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Run with ``number`` CPU threads: float sums differ by thread count."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring `peak_memory_mb` anew, where the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mb(device: torch.device) -> float:
    """Return peak memory in MB: of the tensors on a CUDA device, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)
