"""Identity of a process beyond its id, since ids are used again."""

import os
import time
from pathlib import Path

import psutil


def start_of(pid: int) -> str:
    """Return when a process started, as its kernel counts: setting the clock does not change it.

    (psutil derives the time of day from the clock, and gives another one after it was set.)

    Raises
    ------
    psutil.NoSuchProcess
        If there is none.
    """
    try:
        # Behind the name, which may hold anything: proc(5), field 22 of all, ticks since boot.
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, IndexError):
        return str(psutil.Process(pid).create_time())
    return f"{boot}/{ticks}"


def identity(pid: int) -> str:
    """Return a process's id and start, as `is_alive` takes it."""
    return f"{pid} {start_of(pid)}"


def is_alive(known: str) -> bool:
    """Whether the process of an `identity` still lives; False for any other text."""
    pid, _, started = known.partition(" ")
    try:
        return start_of(int(pid)) == started
    except (psutil.Error, ValueError):
        return False


def seconds_of_process() -> float:
    """Return for how many seconds this process has been there; 0 where its kernel does not say."""
    ticks = start_of(os.getpid()).rpartition("/")[2]
    if not ticks.isdecimal() or not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    return max(0.0, now - int(ticks) / os.sysconf("SC_CLK_TCK"))
