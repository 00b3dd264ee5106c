"""The node's own Ray, in which its warm worker lives.

    python scripts/node_worker.py start [--port 6390] [--num-gpus N] [--temp-dir FOLDER]
    python scripts/node_worker.py status [--port 6390]
    python scripts/node_worker.py stop [--port 6390]

Whoever starts a SuperNode starts this before it, as the same user, and stops it afterwards; the
SuperNode names it: `flower-supernode --node-config "worker='127.0.0.1:6390' ..."`.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.client.warm_worker import ray_runtime  # noqa: E402
from hafl_app.client.warm_worker.ask import NoWorkerError  # noqa: E402
from hafl_app.client.warm_worker.ray_runtime import LOOPBACK  # noqa: E402
from hafl_app.client.warm_worker.ray_workers import connected  # noqa: E402


def main() -> int:
    """Do what the command line asks; return the exit code."""
    options = _parser().parse_args()
    try:
        print({"start": _start, "status": _status, "stop": _stop}[options.action](options))
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _start(options: argparse.Namespace) -> str:
    known = ray_runtime.start(
        options.port,
        num_gpus=options.num_gpus,
        temp_dir=options.temp_dir,
        object_store_mb=options.object_store_mb,
    )
    address = f"{LOOPBACK}:{options.port}"
    return f"Ray on {address}, pid {known.pid}; in the node config: worker='{address}'"


def _status(options: argparse.Namespace) -> str:
    if ray_runtime.running(options.port) is None:
        raise NoWorkerError(f"no Ray of this node on port {options.port}")
    with connected(options.port) as workers:
        return ray_runtime.describe(options.port, workers.names())


def _stop(options: argparse.Namespace) -> str:
    if not ray_runtime.stop(options.port):
        raise NoWorkerError(f"no Ray of this node on port {options.port}")
    return f"stopped the Ray on {LOOPBACK}:{options.port} and its workers"


def _port(text: str) -> int:
    if not text.isdecimal() or not 1024 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 1024 to 65535")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("start", "status", "stop"))
    parser.add_argument("--port", type=_port, default=6390, help="default: %(default)s")
    parser.add_argument("--num-gpus", type=int, help="default: all that there are")
    parser.add_argument(
        "--temp-dir", type=Path, help="for sockets and logs, emptied on stop; at most 40 characters"
    )
    parser.add_argument(
        "--object-store-mb",
        type=int,
        default=1000,
        help="memory for messages on their way (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
