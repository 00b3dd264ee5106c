"""The node's own Ray: started and stopped by the node's operator, reached from this machine only.

Whoever can connect to a Ray can run code in it. So it listens on the loopback alone, and answers
only who has its token, a file that other users cannot read.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from hafl_app.process_identity import start_of

LOOPBACK = "127.0.0.1"
GUARDED = {
    # Off, Ray keeps to 127.0.0.1. Otherwise it resolves that to the machine's outer address,
    # on Linux too, and binds to all of them.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment of a Ray of this machine alone; a token belongs to it."""

_START_SECONDS = 90.0
_STOP_SECONDS = 10.0
_LONGEST_TEMP_DIR = 40  # Ray puts sockets below it, whose whole path has at most 107 bytes


class RayRuntimeError(RuntimeError):
    """A Ray that could not be started or stopped; the message is one line."""


@dataclass(frozen=True)
class RayProcess:
    """A Ray that was started here, by process and folder.

    Parameters
    ----------
    pid, created
        The process that all others of this Ray end with, and its `start_of`.
    temp_dir
        Folder of its sockets and logs, which goes with it.
    """

    pid: int
    created: str
    temp_dir: str


def state_folder(port: int) -> Path:
    """Return the folder that holds the token and the process of a port's Ray, for this user alone.

    It is below ``$HAFL_NODE_STATE``, else ``hafl`` in the user's state folder.
    """
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(os.environ.get("HAFL_NODE_STATE") or Path(root) / "hafl") / f"ray-{port}"


def connection_environment(port: int) -> dict[str, str]:
    """Return the environment in which Ray's processes and clients of a port find each other."""
    return GUARDED | {
        "RAY_AUTH_TOKEN_PATH": str(state_folder(port) / "token"),
        "FLWR_TELEMETRY_ENABLED": "0",
    }


def is_listening(port: int) -> bool:
    """Whether a port of the loopback is taken, at once: Ray itself retries for a minute."""
    with suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=1):
        return True
    return False


def running(port: int) -> RayProcess | None:
    """Return the Ray that was started on a port, if it lives."""
    known = _started_last(port)
    with suppress(psutil.Error):
        if known is not None and start_of(known.pid) == known.created:
            return known
    return None


def start(
    port: int,
    *,
    num_gpus: int | None = None,
    temp_dir: Path | None = None,
    object_store_mb: int = 1000,
) -> RayProcess:
    """Start a Ray for this node; it lives until `stop`, or until the machine stops.

    Parameters
    ----------
    port
        From 1024 to 65535.
    num_gpus
        GPUs that workers may use; None: all that Ray finds.
    temp_dir
        An absolute path of at most 40 characters, for sockets and logs; it goes when Ray stops.
    object_store_mb
        Memory, in MB, through which messages pass; it is taken as they come.

    Raises
    ------
    RayRuntimeError
        If the port is taken, or Ray does not come up.
    """
    if known := running(port):
        raise RayRuntimeError(f"a Ray of this node runs on port {port} already, pid {known.pid}")
    if is_listening(port):
        raise RayRuntimeError(f"port {port} is taken by another program")
    temp_dir = temp_dir or Path(tempfile.gettempdir()) / f"hafl-{os.getuid()}-{port}"
    if (gone := _started_last(port)) and gone.temp_dir == str(temp_dir):
        shutil.rmtree(temp_dir, ignore_errors=True)  # left behind by a power cut or kill -9
    _make_temp_dir(temp_dir)
    folder = state_folder(port)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    _write_token(folder / "token")
    command = _command(port, num_gpus, temp_dir, object_store_mb)
    with (folder / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=dict(os.environ) | connection_environment(port),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    known = RayProcess(process.pid, start_of(process.pid), str(temp_dir))
    (folder / "ray.json").write_text(json.dumps(asdict(known)))
    if not _comes_up(process, port, temp_dir):
        stop(port)
        raise RayRuntimeError(f"Ray did not come up on port {port}; its log: {folder / 'ray.log'}")
    return known


def stop(port: int) -> bool:
    """Stop the Ray that was started on a port, with its workers; no other Ray is touched.

    Returns
    -------
    bool
        Whether there was one.
    """
    known = running(port)
    if known is not None:
        leader = psutil.Process(known.pid)
        family = [leader, *leader.children(recursive=True)]
        with suppress(psutil.NoSuchProcess):
            leader.terminate()  # it stops the others, in order
        _, left = psutil.wait_procs(family, timeout=_STOP_SECONDS)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=_STOP_SECONDS)
        shutil.rmtree(known.temp_dir, ignore_errors=True)
    for name in ("ray.json", "token"):
        (state_folder(port) / name).unlink(missing_ok=True)
    return known is not None


def memory_mb(known: RayProcess) -> float:
    """Return the resident memory of a Ray with its workers, in MB."""
    leader = psutil.Process(known.pid)
    total = 0
    for process in (leader, *leader.children(recursive=True)):
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return total / 1e6


def describe(port: int, workers: Sequence[str]) -> str:
    """Return one line on the Ray of a port."""
    known = running(port)
    if known is None:
        return f"no Ray of this node on port {port}"
    names = ", ".join(workers) or "none"
    return f"Ray on {LOOPBACK}:{port}, pid {known.pid}, {memory_mb(known):.0f} MB; workers: {names}"


def _started_last(port: int) -> RayProcess | None:
    with suppress(OSError, ValueError, TypeError):
        return RayProcess(**json.loads((state_folder(port) / "ray.json").read_text()))
    return None


def _make_temp_dir(path: Path) -> None:
    if not path.is_absolute() or len(str(path)) > _LONGEST_TEMP_DIR:
        raise RayRuntimeError(
            f"temporary folder {path}: expected an absolute path of at most {_LONGEST_TEMP_DIR} "
            "characters, since Ray puts sockets below it"
        )
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        # Another user could read and change its contents.
        raise RayRuntimeError(f"temporary folder {path}: it is a link, or belongs to another user")
    if any(path.iterdir()):  # it is removed when Ray stops
        raise RayRuntimeError(f"temporary folder {path}: it is not empty")
    path.chmod(0o700)


def _write_token(path: Path) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def _command(port: int, num_gpus: int | None, temp_dir: Path, object_store_mb: int) -> list[str]:
    beside = Path(sys.executable).parent / "ray"
    return [
        *(str(beside) if beside.exists() else "ray", "start", "--head", "--block"),
        *(f"--node-ip-address={LOOPBACK}", f"--port={port}"),
        f"--ray-client-server-port={_free_port()}",
        *("--include-dashboard=false", "--disable-usage-stats"),
        # No processes waiting for work, no autoscaler and no reader of logs: they take memory.
        *("--num-cpus=0", "--no-monitor", "--include-log-monitor=false"),
        *([] if num_gpus is None else [f"--num-gpus={num_gpus}"]),
        f"--object-store-memory={object_store_mb * 1_000_000}",
        f"--temp-dir={temp_dir}",
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _comes_up(process: "subprocess.Popen[bytes]", port: int, temp_dir: Path) -> bool:
    deadline = time.monotonic() + _START_SECONDS
    raylet = temp_dir / "session_latest" / "sockets" / "raylet"
    while time.monotonic() < deadline and process.poll() is None:
        if raylet.exists() and is_listening(port):
            return True
        time.sleep(0.2)
    return False
