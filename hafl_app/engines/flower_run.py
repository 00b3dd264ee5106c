"""Run `flwr run` on a SuperLink and in a Flower home of its own, both removed afterwards."""

import json
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hafl_app.cgroups import usable_cpus
from hafl_app.engines.processes import (
    HOME_PREFIX,
    comes_up,
    free_port,
    run_environment,
    start_process,
    stop_processes,
    tool,
)
from hafl_app.engines.ray_cluster import ray_environment

CONNECTION = "own"
"""Name of the SuperLink in the `config.toml` of a run's Flower home."""


class FlowerRunError(RuntimeError):
    """A run that could not be started or did not complete."""


@dataclass(frozen=True)
class SimulationResources:
    """Resources of a simulation by `flwr run`.

    Parameters
    ----------
    num_supernodes
        Virtual nodes, at least 1.
    client_cpus, client_gpus
        Share of one client; they decide how many run at once.
    cluster_cpus
        CPUs that a Ray of the run's own believes to have; None: those of the machine.
    """

    num_supernodes: int
    client_cpus: int
    client_gpus: float
    cluster_cpus: int | None = None

    def to_federation_config(self) -> str:
        """Return the value of `flwr run --federation-config`."""
        cluster = "" if self.cluster_cpus is None else f" init-args-num-cpus={self.cluster_cpus}"
        return (
            f"num-supernodes={self.num_supernodes} "
            f"client-resources-num-cpus={self.client_cpus} "
            f"client-resources-num-gpus={self.client_gpus}{cluster}"
        )


def resources_for(
    num_clients: int,
    num_threads: int,
    num_gpus: int,
    client_cpus: int | None = None,
    client_gpus: float | None = None,
) -> SimulationResources:
    """Return the resources that fit this machine: a CPU per thread, and equal shares of the GPUs.

    Parameters
    ----------
    num_threads
        CPU threads of one client.
    num_gpus
        CUDA devices that clients may use; 0 without, or if they train on the CPU.
    client_cpus, client_gpus
        Given shares take precedence.
    """
    cpus = usable_cpus()
    share = client_cpus if client_cpus is not None else min(num_threads, cpus)
    at_once = max(1, min(num_clients, cpus // share))
    gpu_share = client_gpus if client_gpus is not None else min(1.0, num_gpus / at_once)
    return SimulationResources(num_clients, share, round(gpu_share, 4))


@contextmanager
def own_superlink(
    log_file: Path, ray_address: str | None = None, more: Mapping[str, str] | None = None
) -> Iterator[dict[str, str]]:
    """Start a SuperLink for simulations; yield the environment in which `flwr` reaches it.

    Every process that it or its runs started is stopped afterwards, and its Flower home removed,
    also after an exception.

    Parameters
    ----------
    log_file
        Receives the SuperLink's own log if it failed to start.
    ray_address
        A Ray cluster to simulate on, which keeps running; None starts a Ray for each run.
    more
        Variables of its environment, and of all that its runs start on this machine.

    Raises
    ------
    FlowerRunError
        If it does not come up.
    """
    home = Path(tempfile.mkdtemp(prefix=HOME_PREFIX))
    token, port = uuid.uuid4().hex, free_port()
    environment = run_environment(home, token)
    environment |= ray_environment(ray_address, home / "code", environment)
    environment |= more or {}
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
    """Write the address of the SuperLink `CONNECTION` for the `flwr` command.

    Parameters
    ----------
    home
        Flower home of its callers.
    port
        Of the SuperLink, on the loopback.
    ca
        Certificate of the authority that signed the SuperLink's; None for plain http.
    """
    trust = "insecure = true" if ca is None else f"root-certificates = {json.dumps(str(ca))}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{port}"\n{trust}\n'
    )


def flwr_run(
    app: Path,
    environment: Mapping[str, str],
    run_config: Mapping[str, str],
    resources: SimulationResources | None,
    on_line: Callable[[str], None],
) -> None:
    """Submit the app, forward its log line by line, and wait for its end.

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
        If the run did not start or did not complete, which the exit code of `flwr run` hides; with
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
    """Read a run's status from the SuperLink; the final one may take a moment to arrive."""
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
