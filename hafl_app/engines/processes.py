"""Processes of a run: started under a token, found and stopped by it; tools, ports and start-up."""

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from hafl_app.client.permissions import OWN_MACHINE
from hafl_app.process_identity import identity, is_alive

# Every process of a run inherits this variable, and is found by it afterwards.
_TOKEN = "HAFL_RUN_TOKEN"
_OWNER = "HAFL_RUN_OWNER"  # the `identity` of the process that started them
HOME_PREFIX = "hafl-"
"""Prefix of the names of Flower homes that are made for a run and removed with it."""
_START_SECONDS = 60.0
_STOP_SECONDS = 5.0


def run_environment(home: Path, token: str) -> dict[str, str]:
    """Return the environment of a run's processes.

    Parameters
    ----------
    home
        Their Flower home.
    token
        Identifies them for `stop_processes`.
    """
    scripts = str(Path(sys.executable).parent)
    # The user's own permissions take precedence over those of one's own machine.
    inherited = OWN_MACHINE | dict(os.environ)
    return inherited | {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Repeated warnings of many actors are one line, and Ray's files go with the home.
        "RAY_DEDUP_LOGS": "1",
        "RAY_TMPDIR": str(home / "ray"),
        "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
        # Ray warns about a change of its own defaults in every run.
        "PYTHONWARNINGS": "ignore::FutureWarning:ray._private.worker",
        "COLUMNS": "200",
        _TOKEN: token,
        _OWNER: identity(os.getpid()),
    }


def start_process(
    command: Sequence[str], environment: Mapping[str, str], log_file: Path
) -> "subprocess.Popen[bytes]":
    """Start a process of a run in the background.

    Parameters
    ----------
    environment
        From `run_environment`.
    log_file
        Its output; appended to an existing file.
    """
    with log_file.open("ab") as stream:
        # Its own session, so that Ctrl-C reaches it through this process and in order.
        return subprocess.Popen(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def tool(name: str) -> str:
    """Return a command of the environment that this program runs in."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def free_port() -> int:
    """Return a port of the loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def comes_up(
    process: "subprocess.Popen[bytes]", url: str, context: ssl.SSLContext | None = None
) -> bool:
    """Wait at most a minute until a server is up, and return whether it is.

    Parameters
    ----------
    url
        Answers with status 200 as soon as the server is up.
    context
        How to check the server of an https address.
    """
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with (
            suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(url, timeout=1, context=context) as reply,
        ):
            if reply.status == 200:
                return True
        time.sleep(0.1)
    return False


def processes_of(token: str) -> list[psutil.Process]:
    """Return the living processes of a run, by its token."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(_TOKEN) == token and process.pid != os.getpid():
                found.append(process)
    return found


def stop_abandoned_run(pid: int) -> bool:
    """Stop the run that a process belongs to, if its owner has died (after a kill -9).

    Its Flower home is removed as well, as at the end of the run.

    Returns
    -------
    bool
        Whether it was stopped; False for a process whose owner lives.
    """
    try:
        environment = psutil.Process(pid).environ()
        token, owner = environment[_TOKEN], environment[_OWNER]
        home = Path(environment["FLWR_HOME"])
    except (psutil.Error, KeyError):
        return False
    if is_alive(owner):
        return False
    stop_processes(token)
    if home.name.startswith(HOME_PREFIX):  # never a home that a user chose
        shutil.rmtree(home, ignore_errors=True)
    return True


def stop_processes(token: str) -> None:
    """Stop every process of a run: by SIGTERM, then by SIGKILL, with any started meanwhile."""
    for send in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        processes = processes_of(token)
        for process in processes:
            with suppress(psutil.Error):
                process.send_signal(send)
        psutil.wait_procs(processes, timeout=_STOP_SECONDS)
