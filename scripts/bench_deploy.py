"""Time of a message to a deployed node beyond its training, with and without a warm worker.

    python scripts/bench_deploy.py [--messages 5] [--json FILE] [OVERRIDE ...]

One SuperLink with its fence, TLS and node keys, and two SuperNodes on this machine that hold the
same data; the same training goes to one and to the other by turns. It ends with an error if the
adapters that come back are not the same, bit for bit.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.deployed import NODES, RESULTS  # noqa: E402
from benchmarks.timing import describe, machine, write_json  # noqa: E402

from hafl_app.cli import run_script  # noqa: E402
from hafl_app.client.warm_worker import ray_runtime  # noqa: E402
from hafl_app.deployment.credentials import make_credentials  # noqa: E402
from hafl_app.deployment.local import Deployment, LocalNode, local_deployment  # noqa: E402
from hafl_app.engines.processes import free_port  # noqa: E402

DEFAULTS = (
    *("model=tiny_random", "dataset=synthetic", "dataset.num_train=160", "dataset.num_test=40"),
    *("dataset.max_length=16", "client.batch_size=16", "client.max_steps=4"),
)

# What the timing app has in its pyproject.toml for the app's own.
_TIMING = {
    "hafl_app.server_app:app": "benchmarks.deployed:app",
    '"hafl_app/**/*.py", ': '"hafl_app/**/*.py", "benchmarks/**/*.py", ',
}


def main() -> int:
    """Measure, print and keep the figures; return the exit code."""
    options = _parser().parse_args()
    return run_script(lambda: _run(options), "interrupted: everything that was started is stopped")


def _run(options: argparse.Namespace) -> int:
    where = machine()
    print(describe(where), flush=True)
    with tempfile.TemporaryDirectory(prefix="hafl-") as name:
        rows = measure(options.messages, options.overrides, Path(name))
    check_equal(rows)
    found = {
        "machine": where,
        "load_after": machine()["load"],
        "overrides": [*DEFAULTS, *options.overrides],
        "summary": summary(rows),
        "messages": rows,
    }
    if options.json:
        write_json(options.json, found)
    _print(found)
    return 0


def measure(num_messages: int, overrides: list[str], folder: Path) -> list[dict[str, Any]]:
    """Run the deployment; return one row per message, in their order.

    Parameters
    ----------
    num_messages
        Trainings of each node, at least 2: the first of each loads the model anywhere.
    overrides
        Of the settings.
    folder
        Takes everything that is written.
    """
    settled = (f"federation.num_rounds={num_messages}", f"output_dir={folder}")
    run_config = {"overrides": shlex.join([*DEFAULTS, *overrides, *settled])}
    flower_log: list[str] = []  # its last line is in the error if the run fails
    with _own_ray(folder) as port:
        names = list(NODES.values())
        keys = [name.replace(" ", "-") for name in names]
        credentials = make_credentials(folder / "credentials", [], keys, days=1)
        with local_deployment(credentials, folder / "logs") as deployment:
            _start(deployment, keys, port)
            deployment.run(run_config, flower_log.append, _timing_app(folder / "app"))
    rows: list[dict[str, Any]] = json.loads((folder / RESULTS).read_text())
    return rows


def check_equal(rows: list[dict[str, Any]]) -> None:
    """Refuse figures of trainings that did not bring the same.

    Raises
    ------
    RuntimeError
        If the adapters of any two trainings differ.
    """
    digests = {row["sha256"] for row in rows if row["kind"] == "train"}
    if len(digests) != 1:
        raise RuntimeError(f"{len(digests)} different adapters from the same training, expected 1")


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return seconds beyond training by way of answering: of the first message, then the rest."""
    found = {}
    for way in NODES.values():
        first, *rest = [r["beyond"] for r in rows if (r["way"], r["kind"]) == (way, "train")]
        found[way] = {
            "first": first,
            "median": statistics.median(rest),
            "min": min(rest),
            "max": max(rest),
        }
    return found


def _start(deployment: Deployment, names: list[str], port: int) -> None:
    deployment.start_superlink()
    deployment.start_fence()
    for (rank, _), name in zip(NODES.items(), names, strict=True):
        node = LocalNode(name, rank)
        config = node.config(0, 1)
        if rank == max(NODES):
            config += f" worker='{ray_runtime.LOOPBACK}:{port}'"
        deployment.register(name)
        deployment.start_node(node, 0, 1, ("--node-config", config))
    deployment.wait_online(len(NODES))


@contextmanager
def _own_ray(folder: Path) -> Iterator[int]:
    """Start a Ray for this measurement alone."""
    os.environ["HAFL_NODE_STATE"] = str(folder / "state")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="hafl-", dir="/tmp") as temp_dir:
        ray_runtime.start(port, temp_dir=Path(temp_dir))
        try:
            yield port
        finally:
            ray_runtime.stop(port)
            Path(temp_dir).mkdir(exist_ok=True)


def _timing_app(folder: Path) -> Path:
    """Copy the app with another ServerApp, and the package that it is in."""
    for source in (ROOT / "hafl_app", ROOT / "conf", ROOT / "scripts" / "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, folder / source.name, ignore=ignored)
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    project = (ROOT / "pyproject.toml").read_text()
    for own, timing in _TIMING.items():
        if own not in project:
            raise RuntimeError(f"pyproject.toml: {own} is missing")
        project = project.replace(own, timing)
    (folder / "pyproject.toml").write_text(project)
    return folder


def _print(found: dict[str, Any]) -> None:
    print(f"load {found['machine']['load']} before, {found['load_after']} after")
    print("seconds of a training message beyond training, as the server sees it")
    print(f"{'':12}{'first':>8}{'median':>8}{'min':>8}{'max':>8}")
    for way, figures in found["summary"].items():
        print(f"{way:12}" + "".join(f"{figures[k]:8.1f}" for k in figures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=_at_least_two, default=5, help="to each node, from 2")
    parser.add_argument("--json", type=Path, help="file that takes every figure")
    parser.add_argument("overrides", nargs="*", help="of the settings")
    return parser


def _at_least_two(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 2")
    return number


if __name__ == "__main__":
    sys.exit(main())
