"""One `flwr run` on a SuperLink of its own, in a Flower home of its own, leaving nothing behind."""

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hafl_app.client.permissions import OWN_MACHINE
from hafl_app.engines.ray_cluster import ray_environment

# Every process that a run starts inherits this variable, and is found by it afterwards.
_TOKEN = "HAFL_RUN_TOKEN"
_OWNER = "HAFL_RUN_OWNER"  # "<pid> <start time>" of the process that started them
CONNECTION = "own"
"""Name of the SuperLink in the `config.toml` of a run's Flower home."""
HOME_PREFIX = "hafl-"
"""How the names of the Flower homes begin that are made for a run and go with it."""
_START_SECONDS = 60.0
_STOP_SECONDS = 5.0


class FlowerRunError(RuntimeError):
    """A run that could not be started, or did not finish well."""


@dataclass(frozen=True)
class SimulationResources:
    """What `flwr run` is to simulate with.

    Parameters
    ----------
    num_supernodes
        Virtual nodes, at least 1.
    client_cpus, client_gpus
        Share of one client; with them follows how many run at once.
    """

    num_supernodes: int
    client_cpus: int
    client_gpus: float

    def to_federation_config(self) -> str:
        """Return the value of `flwr run --federation-config`."""
        return (
            f"num-supernodes={self.num_supernodes} "
            f"client-resources-num-cpus={self.client_cpus} "
            f"client-resources-num-gpus={self.client_gpus}"
        )


def resources_for(
    num_clients: int,
    num_threads: int,
    num_gpus: int,
    client_cpus: int | None = None,
    client_gpus: float | None = None,
) -> SimulationResources:
    """Look at the machine: one CPU a thread, and a share of the GPUs for as many as run at once.

    Parameters
    ----------
    num_threads
        CPU threads of one client.
    num_gpus
        CUDA devices that clients may use; 0 without, or if they are told to train on the CPU.
    client_cpus, client_gpus
        Given shares win.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = client_cpus if client_cpus is not None else min(num_threads, cpus)
    at_once = max(1, min(num_clients, cpus // share))
    gpu_share = client_gpus if client_gpus is not None else min(1.0, num_gpus / at_once)
    return SimulationResources(num_clients, share, round(gpu_share, 4))


@contextmanager
def own_superlink(log_file: Path, ray_address: str | None = None) -> Iterator[dict[str, str]]:
    """Start a SuperLink for simulations; yield the environment in which `flwr` speaks to it.

    Whatever happens inside, every process that it or its runs started is gone afterwards, and so
    is its Flower home.

    Parameters
    ----------
    log_file
        Where the SuperLink's own log is kept if it failed to start.
    ray_address
        A Ray cluster to simulate on, which is left as it is; None starts a Ray for each run.

    Raises
    ------
    FlowerRunError
        If it does not come up.
    """
    home = Path(tempfile.mkdtemp(prefix=HOME_PREFIX))
    token, port = uuid.uuid4().hex, free_port()
    environment = run_environment(home, token)
    environment |= ray_environment(ray_address, home / "code", environment)
    name_superlink(home, port)
    superlink_log = home / "superlink.log"
    try:
        command = [
            *(tool("flower-superlink"), "--insecure", "--simulation"),
            *("--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(port)),
            *("--log-file", str(home / "superlink-rotating.log")),
        ]
        process = start_process(command, environment, superlink_log)
        if not comes_up(process, f"http://127.0.0.1:{port}/health"):
            shutil.copy(superlink_log, log_file)
            raise FlowerRunError(f"the SuperLink did not come up; its log: {log_file}")
        yield environment
    finally:
        stop_processes(token)
        shutil.rmtree(home, ignore_errors=True)


def name_superlink(home: Path, port: int, ca: Path | None = None) -> None:
    """Write where the `flwr` command finds the SuperLink `CONNECTION`.

    Parameters
    ----------
    home
        Flower home of those who call it.
    port
        Of the SuperLink, on the loopback.
    ca
        Certificate of the authority that signed the SuperLink's; None if it speaks plain http.
    """
    trust = "insecure = true" if ca is None else f"root-certificates = {json.dumps(str(ca))}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{port}"\n{trust}\n'
    )


def start_process(
    command: Sequence[str], environment: Mapping[str, str], log_file: Path
) -> "subprocess.Popen[bytes]":
    """Start a process of a run in the background.

    Parameters
    ----------
    environment
        From `run_environment`.
    log_file
        Takes what it prints; an existing one goes on.
    """
    with log_file.open("ab") as stream:
        # Its own session, so that Ctrl-C reaches it through us and in order.
        return subprocess.Popen(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def flwr_run(
    app: Path,
    environment: Mapping[str, str],
    run_config: Mapping[str, str],
    resources: SimulationResources | None,
    on_line: Callable[[str], None],
) -> None:
    """Submit the app, pass its log on line by line, and wait for its end.

    Parameters
    ----------
    app
        Folder of the app.
    environment
        From `own_superlink`, or another one whose Flower home names the SuperLink `CONNECTION`.
    run_config
        Values of the app's run config.
    resources
        None if the nodes are real.
    on_line
        Called with every line of the log.

    Raises
    ------
    FlowerRunError
        If the run did not start or did not complete, which `flwr run` itself does not say; with
        the reason that the SuperLink gives.
    """
    home = Path(environment["FLWR_HOME"])
    config_file = home / "run-config.toml"
    # JSON strings are TOML basic strings.
    config_file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in run_config.items()))
    command = [
        *(tool("flwr"), "run", str(app), CONNECTION, "--stream"),
        *("--run-config", str(config_file)),
    ]
    if resources is not None:
        command += ["--federation-config", resources.to_federation_config()]
    run_id, last_line = "", ""
    with subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for raw_line in process.stdout:
            line = raw_line.rstrip("\n")
            last_line = line.strip(" │╭╮╰╯─") or last_line
            if match := re.search(r"Successfully started run (\d+)", line):
                run_id = match.group(1)
            on_line(line)
    if not run_id:
        raise FlowerRunError(f"`flwr run` started no run: {last_line}")
    status, details = _status(environment, run_id)
    if status != "finished:completed":
        raise FlowerRunError(f"the run is {status}: {_shorten(details) or 'no reason given'}")


def _status(environment: Mapping[str, str], run_id: str) -> tuple[str, str]:
    """Ask the SuperLink how a run ended; its last words may take a moment to arrive."""
    status, details = "unknown", ""
    for _ in range(20):
        result = subprocess.run(
            [tool("flwr"), "list", CONNECTION, "--run-id", run_id, "--format", "json"],
            env=dict(environment),
            capture_output=True,
            text=True,
            check=False,
        )
        run = _first_run(result.stdout)
        status, details = str(run.get("status", "unknown")), str(run.get("status-details", ""))
        if status.startswith("finished"):
            break
        time.sleep(0.5)
    return status, details


def _first_run(text: str) -> dict[str, Any]:
    with suppress(ValueError):
        runs = json.loads(text).get("runs") or [{}]
        return dict(runs[0])
    return {}


def _shorten(details: str) -> str:
    lines = [line.strip() for line in details.splitlines() if line.strip()]
    return lines[0] if lines else ""


def run_environment(home: Path, token: str) -> dict[str, str]:
    """Return the environment of a run's processes.

    Parameters
    ----------
    home
        Their Flower home.
    token
        By which `stop_processes` finds them.
    """
    scripts = str(Path(sys.executable).parent)
    # What the user has set goes before what is allowed on one's own machine.
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
        # Ray announces a change of its own defaults in every run.
        "PYTHONWARNINGS": "ignore::FutureWarning:ray._private.worker",
        "COLUMNS": "200",
        _TOKEN: token,
        _OWNER: f"{os.getpid()} {psutil.Process().create_time()}",
    }


def tool(name: str) -> str:
    """Return a command of the environment that this program runs in."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def free_port() -> int:
    """Return a port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def comes_up(
    process: "subprocess.Popen[bytes]", url: str, context: ssl.SSLContext | None = None
) -> bool:
    """Wait until a server answers, and say whether it did before it ended or a minute passed.

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
    """Return the living processes that were started under a run's token."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(_TOKEN) == token and process.pid != os.getpid():
                found.append(process)
    return found


def stop_abandoned_run(pid: int) -> bool:
    """Stop the run that a process belongs to, if whoever started it is gone (after a kill -9).

    Its Flower home goes as well, as it would have at the end of the run.

    Returns
    -------
    bool
        Whether it was stopped; False for a process that somebody still looks after.
    """
    try:
        environment = psutil.Process(pid).environ()
        token, (owner, started) = environment[_TOKEN], environment[_OWNER].split()
        home = Path(environment["FLWR_HOME"])
    except (psutil.Error, KeyError, ValueError):
        return False
    with suppress(psutil.NoSuchProcess):
        if psutil.Process(int(owner)).create_time() == float(started):
            return False
    stop_processes(token)
    if home.name.startswith(HOME_PREFIX):  # never a home that a user chose
        shutil.rmtree(home, ignore_errors=True)
    return True


def stop_processes(token: str) -> None:
    """Stop every process of a run: politely, then by force; new ones that appear meanwhile too."""
    for send in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        processes = processes_of(token)
        for process in processes:
            with suppress(psutil.Error):
                process.send_signal(send)
        psutil.wait_procs(processes, timeout=_STOP_SECONDS)
