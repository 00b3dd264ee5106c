"""`bash scripts/deploy_local.sh`: one run on a deployment of this machine, from keys to adapter."""

import argparse
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from hafl_app.cli import run_script
from hafl_app.config.compose import quoted
from hafl_app.deployment.credentials import Credentials, make_credentials
from hafl_app.deployment.local import Deployment, LocalNode, local_deployment
from hafl_app.deployment.own_folder import own_folder, remove_abandoned
from hafl_app.run.run_folder import check_new, default_folder

TINY = (
    *("model=tiny_random", "dataset.max_length=16", "client.batch_size=16"),
    "federation.num_rounds=2",
)
"""Overrides of the trial run: random weights, seconds of training."""
_GENERATED_DATA = ("dataset=synthetic", "dataset.num_train=160", "dataset.num_test=40")
_DATA_ON_DEVICES = ("dataset=on_device",)
_RANKS = (2, 4, 8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Deploy, run, collect and stop everything; return the exit code of the run."""
    options = _parser().parse_args(arguments)

    def job() -> int:
        with ExitStack() as stack:
            nodes = _nodes(options)
            output = options.output.absolute() if options.output else default_folder("deployed")
            check_new(output)
            if count := remove_abandoned():
                _say(f"Stopped and removed what {count} killed deployment(s) had left behind")
            credentials = _credentials(options, nodes, stack)
            deployment = stack.enter_context(local_deployment(credentials, output / "logs"))
            start(deployment, nodes)
            overrides = _overrides(options, nodes, output)
            deployment.run({"overrides": shlex.join(overrides)}, _say)
            _say(f"Adapter, metrics and logs: {output}")
        return 0

    return run_script(job, "interrupted: everything that was started is stopped")


def start(deployment: Deployment, nodes: Sequence[LocalNode]) -> None:
    """Start all parts of a deployment and wait until every node is online.

    Raises
    ------
    hafl_app.deployment.local.DeploymentError
        If one does not come up.
    """
    deployment.start_superlink()
    deployment.start_fence()
    _say(
        f"SuperLink: 127.0.0.1:{deployment.superlink_port}, for the operator alone; "
        f"fence: 127.0.0.1:{deployment.fence_port}, for the nodes"
    )
    for partition_id, node in enumerate(nodes):
        deployment.register(node.name)
        deployment.start_node(node, partition_id, len(nodes))
    deployment.wait_online(len(nodes))
    _say("Online: " + ", ".join(f"{node.name} (rank {node.rank})" for node in nodes))


def _nodes(options: argparse.Namespace) -> list[LocalNode]:
    count, data = options.nodes, options.data
    if count < 1:
        raise ValueError(f"--nodes {count}: expected at least 1")
    if data and len(data) != count:
        raise ValueError(f"--data: {len(data)} files for {count} nodes, expected one for each")
    for path in data:
        if not path.is_file():
            raise ValueError(f"--data {path}: no such file")
    ranks = options.ranks or [_RANKS[i % len(_RANKS)] for i in range(count)]
    if len(ranks) != count or min(ranks) < 1:
        given = ",".join(map(str, ranks))
        raise ValueError(f"--ranks {given}: expected {count} numbers from 1, one for each node")
    return [
        LocalNode(
            f"node-{i}",
            rank,
            data[i].absolute() if data else None,
            text_column=options.text_column,
            label_column=options.label_column,
        )
        for i, rank in enumerate(ranks)
    ]


def _credentials(
    options: argparse.Namespace, nodes: Sequence[LocalNode], stack: ExitStack
) -> Credentials:
    names = [node.name for node in nodes]
    if options.credentials is None:
        folder = stack.enter_context(own_folder()).path / "credentials"
        return make_credentials(folder, [], names, days=1, keep_ca_key=False)
    given = Credentials(options.credentials.absolute())
    for path in (given.ca, given.server_certificate, given.server_key, *map(given.node_key, names)):
        if not path.is_file():
            raise ValueError(f"--credentials {given.folder}: {path} is missing")
    return given


def _overrides(
    options: argparse.Namespace, nodes: Sequence[LocalNode], output: Path
) -> tuple[str, ...]:
    data = _DATA_ON_DEVICES if options.data else _GENERATED_DATA
    # The last one of a setting counts: the user's go before ours, but for what is settled here.
    settled = (f"federation.num_clients={len(nodes)}", f"output_dir={quoted(output)}")
    return (*data, *TINY, *options.overrides, *settled)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deploy_local.sh",
        description="Run once on a real SuperLink and SuperNodes on this machine, with TLS, node "
        "keys and the fence, and stop all of it.",
    )
    parser.add_argument("--nodes", type=int, default=3, help="SuperNodes (default: %(default)s)")
    parser.add_argument(
        "--ranks",
        type=lambda text: [int(word) for word in text.split(",")],
        metavar="R,R,...",
        help="rank budget of each node (default: 2,4,8 in turn)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a node's own data file; once per node, in their order (default: generated text)",
    )
    for kind in ("text", "label"):
        parser.add_argument(
            f"--{kind}-column",
            default=kind,
            metavar="COLUMN",
            help=f"with the {kind}s in these files (default: %(default)s)",
        )
    parser.add_argument(
        "--credentials",
        type=Path,
        metavar="FOLDER",
        help="of make_credentials.py, with nodes node-0, node-1, ... (default: made for this run)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: outputs/<date>/<time>-deployed"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="-- OVERRIDE",
        help="settings of the run, e.g. -- model=minilm federation.num_rounds=5",
    )
    return parser
