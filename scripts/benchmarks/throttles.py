"""Throttles for nodes of one machine: a share of the processor, and a slow connection."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PERIOD_US = 100_000
_BEFORE_OTHERS = 64  # times the weight of what else runs: a share is to be had on a busy machine
_PIECE = 16 * 1024


@contextmanager
def share_of_processor(pid: int, share: float | None) -> Iterator[None]:
    """Give a process, and those that it starts, so much of one processor, as long as this lasts.

    Parameters
    ----------
    share
        Above 0; None for what it needs.

    Raises
    ------
    OSError
        If control groups are not to be written, as they are by root on Linux.
    """
    old = Path("/sys/fs/cgroup/cpu")  # the first version of control groups
    first = old.is_dir()
    group = (old if first else old.parent) / f"hafl-{pid}"
    group.mkdir()
    try:
        quota = -1 if share is None else round(share * _PERIOD_US)
        if first:
            (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
            (group / "cpu.shares").write_text(str(1024 * _BEFORE_OTHERS))
        else:
            most = "max" if share is None else quota
            (group / "cpu.max").write_text(f"{most} {_PERIOD_US}")
            (group / "cpu.weight").write_text(str(100 * _BEFORE_OTHERS))
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        for left in (group / "cgroup.procs").read_text().split():
            with suppress(OSError):
                (group.parent / "cgroup.procs").write_text(left)
        group.rmdir()


class SlowConnection:
    """A port of the loopback that passes bytes on to another, so many a second each way.

    Parameters
    ----------
    port
        Where to pass them on to.
    down_mbps, up_mbps
        Bandwidth from there and to there, of all connections together, in 10^6 bit/s.
    """

    def __init__(self, port: int, down_mbps: float, up_mbps: float) -> None:
        self._mbps = {"down": down_mbps, "up": up_mbps}
        self._target = ("127.0.0.1", port)
        self._free_at = {"down": 0.0, "up": 0.0}
        self._lock = threading.Lock()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no further connections."""
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                there = socket.create_connection(self._target)
                for source, to, way in ((client, there, "up"), (there, client, "down")):
                    threading.Thread(
                        target=self._pass_on, args=(source, to, way), daemon=True
                    ).start()

    def _pass_on(self, source: socket.socket, to: socket.socket, way: str) -> None:
        with suppress(OSError):
            while piece := source.recv(_PIECE):
                time.sleep(self._wait(len(piece), way))
                to.sendall(piece)
        for end in (source, to):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _wait(self, count: int, way: str) -> float:
        """Return the seconds until so many bytes have passed."""
        with self._lock:
            now = time.monotonic()
            self._free_at[way] = max(now, self._free_at[way]) + 8e-6 * count / self._mbps[way]
            return self._free_at[way] - now
