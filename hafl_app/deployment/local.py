"""A whole deployment on this machine: SuperLink, fence and SuperNodes as on real devices.

The SuperLink listens on one port of the loopback and the fence on another; nodes and other callers
see the fence's only. Everything has TLS, and nodes have keys.
"""

import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from hafl_app.deployment.credentials import Credentials
from hafl_app.deployment.own_folder import own_folder
from hafl_app.deployment.presence import FLEET_FILE
from hafl_app.engines.app_folder import app_folder
from hafl_app.engines.flower_run import CONNECTION, flwr_run, name_superlink
from hafl_app.engines.processes import (
    comes_up,
    free_port,
    run_environment,
    start_process,
    tool,
)

_ROOT = Path(__file__).resolve().parents[2]
_ONLINE_SECONDS = 120.0
_POLL_SECONDS = 1.0
_STOP_SECONDS = 3.0


class DeploymentError(RuntimeError):
    """A part of the deployment that did not come up, with its last words."""


@dataclass(frozen=True)
class LocalNode:
    """A SuperNode to start.

    Parameters
    ----------
    name
        As in the credentials.
    rank
        Its rank budget, at least 1.
    data
        Its own data file, if it does not take its part of the common data.
    text_column, label_column
        Of that file.
    """

    name: str
    rank: int
    data: Path | None = None
    text_column: str = "text"
    label_column: str = "label"

    def config(self, partition_id: int, num_partitions: int) -> str:
        """Return its ``--node-config``."""
        words = f"partition-id={partition_id} num-partitions={num_partitions} rank={self.rank}"
        if self.data is None:
            return words
        own = {
            "data-path": str(self.data),
            "text-column": self.text_column,
            "label-column": self.label_column,
        }
        return " ".join([words, *(f"{key}={json.dumps(value)}" for key, value in own.items())])


@dataclass
class Deployment:
    """Starts the parts, one by one; `local_deployment` stops them.

    Parameters
    ----------
    home
        Folder for everything that Flower keeps.
    logs
        Folder that takes one log file per part.
    environment
        Of all processes, from `run_environment`.
    """

    home: Path
    logs: Path
    credentials: Credentials
    environment: dict[str, str]
    superlink_port: int = field(default_factory=free_port)
    fence_port: int = field(default_factory=free_port)
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def start_superlink(self) -> None:
        """Start the SuperLink, on the loopback, and name it to the `flwr` command.

        Raises
        ------
        DeploymentError
            If it does not come up.
        """
        name_superlink(self.home, self.superlink_port, self.credentials.ca)
        command = [
            *(tool("flower-superlink"), "--enable-supernode-auth"),
            *("--host", "127.0.0.1", "--port", str(self.superlink_port)),
            *("--ssl-ca-certfile", str(self.credentials.ca)),
            *("--ssl-certfile", str(self.credentials.server_certificate)),
            *("--ssl-keyfile", str(self.credentials.server_key)),
        ]
        self.start_server("superlink", command, self.superlink_port)

    def start_fence(self) -> None:
        """Start the fence, which is what nodes reach.

        Raises
        ------
        DeploymentError
            If it does not come up.
        """
        command = [
            # The code beside this file, whatever is installed.
            *("env", f"PYTHONPATH={_ROOT}", sys.executable, "-m", "hafl_app.deployment.fence"),
            *("--credentials", str(self.credentials.folder)),
            *("--superlink", f"127.0.0.1:{self.superlink_port}"),
            *("--host", "127.0.0.1", "--port", str(self.fence_port)),
            *("--fleet", str(self.logs / FLEET_FILE)),
        ]
        self.start_server("fence", command, self.fence_port)

    def start_server(self, name: str, command: Sequence[str], port: int) -> None:
        """Start a part that serves https, and wait until it answers.

        Raises
        ------
        DeploymentError
            If it does not come up.
        """
        process = start_process(command, self.environment, self.logs / f"{name}.log")
        self._keep(name, process)
        context = ssl.create_default_context(cafile=self.credentials.ca)
        if not comes_up(process, f"https://127.0.0.1:{port}/health", context):
            raise DeploymentError(f"the {name} did not come up: {self.last_log_line(name)}")

    def _keep(self, name: str, process: "subprocess.Popen[bytes]") -> None:
        """Add a process of the deployment; its process group ends with it.

        Flower's executor looks for its SuperNode's process id, which a process that was killed
        keeps until its end is asked for, and between two looks it may wait for half a minute.
        """
        self.processes[name] = process
        threading.Thread(target=_end_group_after, args=[process], daemon=True).start()

    def register(self, name: str) -> None:
        """Register a node's public key, as the operator on the server does.

        Raises
        ------
        DeploymentError
            If the SuperLink does not take it.
        """
        key = self.credentials.node_public_key(name)
        result = self.flwr("supernode", "register", str(key), CONNECTION, "--name", name)
        if result.returncode:
            raise DeploymentError(f"node {name} was not registered: {_last_line(result.stdout)}")

    def start_node(
        self,
        node: LocalNode,
        partition_id: int,
        num_partitions: int,
        extra: Sequence[str] = (),
    ) -> "subprocess.Popen[bytes]":
        """Start a SuperNode with a Flower home of its own.

        Parameters
        ----------
        partition_id, num_partitions
            Which part of the common data it takes.
        extra
            Further arguments; one that stands here as well as there counts.
        """
        command = [
            *(tool("flower-supernode"), "--superlink", f"127.0.0.1:{self.fence_port}"),
            *("--root-certificates", str(self.credentials.ca)),
            *("--auth-supernode-private-key", str(self.credentials.node_key(node.name))),
            *("--host", "127.0.0.1", "--port", str(free_port())),
            *("--node-config", node.config(partition_id, num_partitions)),
            *extra,
        ]
        environment = self.environment | {"FLWR_HOME": str(self.home / node.name)}
        process = start_process(command, environment, self.logs / f"{node.name}.log")
        self._keep(node.name, process)
        return process

    def wait_online(self, num_nodes: int) -> None:
        """Wait until as many nodes are online.

        Raises
        ------
        DeploymentError
            If one of the parts ends meanwhile, or it takes more than two minutes.
        """
        deadline = time.monotonic() + _ONLINE_SECONDS
        while self.num_online() < num_nodes:
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise DeploymentError(f"{name} ended: {self.last_log_line(name)}")
            if time.monotonic() > deadline:
                raise DeploymentError(f"not {num_nodes} nodes online in {_ONLINE_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)

    def num_online(self) -> int:
        """Return the number of nodes online, as the SuperLink counts them."""
        result = self.flwr("supernode", "list", CONNECTION, "--format", "json")
        try:
            nodes = json.loads(result.stdout)["nodes"]
        except (ValueError, KeyError):
            raise DeploymentError(f"no list of nodes: {_last_line(result.stdout)}") from None
        return sum(node["status"] == "online" for node in nodes)

    def run(
        self, run_config: Mapping[str, str], on_line: Callable[[str], None], app: Path | None = None
    ) -> None:
        """Submit a run, of this app unless another is given, and wait for its end.

        Raises
        ------
        hafl_app.engines.flower_run.FlowerRunError
            If it did not complete.
        """
        with nullcontext(app) if app else app_folder() as folder:
            flwr_run(folder, self.environment, run_config, None, on_line)

    def flwr(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run the `flwr` command against the SuperLink, on the operator's side of the fence."""
        return subprocess.run(
            [tool("flwr"), *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def last_log_line(self, name: str) -> str:
        """Return the last line of a part's log."""
        return _last_line((self.logs / f"{name}.log").read_text(errors="replace"))


@contextmanager
def local_deployment(credentials: Credentials, logs: Path) -> Iterator[Deployment]:
    """Yield a deployment without any process; stop all its processes at the end.

    Parameters
    ----------
    logs
        Folder for the logs; it is made if need be, and stays.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with own_folder() as folder:
        environment = run_environment(folder.path, folder.token)
        deployment = Deployment(folder.path, logs, credentials, environment)
        try:
            yield deployment
        finally:
            # By id as well: nginx overwrites its environment, by which the others are found.
            for process in deployment.processes.values():
                process.terminate()


def _end_group_after(leader: "subprocess.Popen[bytes]") -> None:
    leader.wait()
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(leader.pid, number)  # `start_process` makes each the leader of its own
        except ProcessLookupError:
            return
        time.sleep(_STOP_SECONDS)


def _last_line(text: str) -> str:
    lines = [line.strip(" │╭╮╰╯─") for line in text.splitlines()]
    return next((line for line in reversed(lines) if line), "nothing was printed")
