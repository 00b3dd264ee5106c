"""The device to train on: its kind and memory, its precision, and how many threads it may use."""

import contextlib
import functools
import logging
import os
import platform
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from hafl_app.cgroups import usable_cpus, usable_memory

_LOGGER = logging.getLogger(__name__)
_MEGABYTE = 1e6
_ISAS_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")


class DeviceError(ValueError):
    """A device that was asked for and is not there."""


def resolve_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu`` or ``cuda``.

    Raises
    ------
    DeviceError
        If CUDA is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("client.device=cuda, but no CUDA device is available")
    return torch.device(name)


def describe_device(device: torch.device) -> str:
    """Return the kind of a device, and on CUDA its name."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return device.type


@dataclass(frozen=True)
class DeviceFacts:
    """Facts of a device: its kind, name and memory.

    Parameters
    ----------
    kind, name
        ``cpu``, ``cuda`` or ``unknown``, and the model's name.
    memory_total_mb, memory_free_mb
        In MB of 10^6 bytes; on the CPU no more than the container or service may use.
    torch_version, cuda_version
        Of PyTorch and of the CUDA that it was built with; empty for a CPU build.
    """

    kind: str
    name: str
    memory_total_mb: int
    memory_free_mb: int
    torch_version: str
    cuda_version: str


UNKNOWN_DEVICE = DeviceFacts("unknown", "", 0, 0, "", "")
"""Facts of a device whose operator gives none."""


def device_facts(device: torch.device) -> DeviceFacts:
    """Read the facts of a device, with its free memory now."""
    total, free = _memory(device)
    cuda = device.type == "cuda"
    return DeviceFacts(
        kind=device.type,
        name=torch.cuda.get_device_name(device) if cuda else cpu_name(),
        memory_total_mb=int(total / _MEGABYTE),
        memory_free_mb=int(free / _MEGABYTE),
        torch_version=str(torch.__version__),
        cuda_version=torch.version.cuda or "",
    )


def usable_memory_mb(device: torch.device) -> float:
    """Return the free memory plus what this process holds of it already, in MB of 10^6 bytes.

    On the CPU that is what the whole process may grow to; on CUDA what its tensors may take.
    """
    _, free = _memory(device)
    if device.type == "cuda":
        return (free + torch.cuda.memory_reserved(device)) / _MEGABYTE
    return float(free + psutil.Process().memory_info().rss) / _MEGABYTE


def _memory(device: torch.device) -> tuple[int, int]:
    """Return the device's memory and the free part of it, in bytes."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    return usable_memory()


def cpu_name() -> str:
    """Return the model name of this machine's processor, or its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def resolve_precision(name: str, device: torch.device) -> str:
    """Return ``fp32`` or ``bf16`` for ``auto``, ``fp32`` or ``bf16``: what ``device`` computes in.

    ``auto`` is bf16 where products in it are faster: on CUDA from compute capability 8.0, on
    processors with AVX-512-BF16 or AMX.
    """
    if name != "auto":
        return name
    return "bf16" if _multiplies_bf16(device) else "fp32"


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Products in bf16 are oneDNN's, whose user may keep it from such instructions.
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _ISAS_WITHOUT_BF16:
        return False
    # Younger than the oldest torch that is supported.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context for ``auto``, ``fp32`` or ``bf16``."""
    enabled = resolve_precision(precision, device) == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Run with ``number`` CPU threads, since float sums differ by their number.

    With no more than there are CPUs, though: threads that wait for each other's turn cost several
    times the CPU time of one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(_bounded(number, usable_cpus()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _bounded(number: int, cpus: int) -> int:
    if number > cpus:
        _LOGGER.warning("%d threads on %d usable CPUs would wait for each other", number, cpus)
    return min(number, cpus)


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring `peak_memory_mb` anew, where the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mb(device: torch.device) -> float:
    """Return peak memory in MB of 10^6 bytes: of a CUDA device's tensors, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return _peak_of_process() / _MEGABYTE


def _peak_of_process() -> int:
    """Return the most bytes that this process has had in memory."""
    # On Linux ru_maxrss of a new process starts from that of the one which started it.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
