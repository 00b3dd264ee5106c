"""What this process may use of the machine: CPUs, and the memory limits of its cgroups (v2)."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use, by its affinity and its cgroups."""
    affinity = getattr(os, "sched_getaffinity", None)  # on Linux alone
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min([cpus, *_cpu_quotas()])


def usable_memory() -> tuple[int, int]:
    """Return the memory that this process may use and the free part of it, in bytes."""
    machine, limits = psutil.virtual_memory(), list(memory_limits())
    total = min([machine.total, *(limit for limit, _ in limits)])
    return total, min([machine.available, *(max(0, limit - used) for limit, used in limits)])


def memory_limits() -> Iterator[tuple[int, int]]:
    """Yield the limit and the use, in bytes, of every group around a process that has a limit."""
    for group in _groups_around():
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit here
            limit = int((group / "memory.max").read_text(encoding="utf-8"))
            yield limit, _use(group)


def _cpu_quotas() -> Iterator[int]:
    """Yield the CPUs, rounded up, of every group around a process that has a quota."""
    for group in _groups_around():
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no quota here
            quota, period = map(int, (group / "cpu.max").read_text(encoding="utf-8").split())
            yield math.ceil(quota / period)


def _groups_around() -> Iterator[Path]:
    """Yield the folders of a process's own group and of those that it lies in."""
    folder = _ROOT / _own_group().strip("/")
    # A container may be shown the host's path under a mount that begins at its own group.
    for group in (folder, *folder.parents):
        if not group.is_relative_to(_ROOT):
            return
        yield group


def _own_group() -> str:
    """Return this process's path in the unified hierarchy (cgroup v2), ``/`` when there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            if line.startswith("0::"):
                return line.removeprefix("0::")
    return "/"


def _use(group: Path) -> int:
    """Return the used bytes of a group that cannot be reclaimed, so without its files' cache."""
    used = int((group / "memory.current").read_text(encoding="utf-8"))
    for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            return used - int(value)
    return used
