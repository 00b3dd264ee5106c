"""Predicted and measured time of one deployment with two throttled nodes.

    python scripts/bench_simulated_time.py [--rounds 3] [--json FILE] [OVERRIDE ...]

One SuperLink with its fence, TLS and node keys, and two SuperNodes on this machine: a weak one of
rank 2 that has a fifth of a processor and 0.5 Mbit/s up, a strong one of rank 32 that has two
fifths and 5 Mbit/s. What the clock needs to know is measured before: the FLOP/s of training steps
on this machine, and the seconds of a request beside its work in a run whose trainings have one
step. Then `devices` predicts rounds that the same nodes really take, of two and of five epochs.

Control groups hold the nodes to their shares, so that it takes root on Linux. Connections cannot be
much slower: Flower 1.41 gives a call of a node five seconds, and an adapter is sent in one.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.throttles import SlowConnection, share_of_processor  # noqa: E402
from benchmarks.timing import describe, machine, write_json  # noqa: E402

from hafl_app.cli import run_script  # noqa: E402
from hafl_app.config.compose import compose  # noqa: E402
from hafl_app.deployment.credentials import make_credentials  # noqa: E402
from hafl_app.deployment.local import Deployment, LocalNode, local_deployment  # noqa: E402
from hafl_app.run.device_speed import measure_speed  # noqa: E402

DEFAULTS = (
    *("model=minilm", "model.num_layers=2", "dataset=synthetic", "dataset.num_train=600"),
    *("dataset.num_test=20", "dataset.max_length=32", "client.batch_size=16", "strategy=hetlora"),
    *("client.precision=fp32", "federation.fraction_evaluate=0", "federation.num_clients=2"),
    *("federation.central_evaluation=false", "federation.checkpoint_every=0"),
    "lora.max_rank=32",
)
NODES = (LocalNode("weak", 2), LocalNode("strong", 32))
CLASSES = {"weak": "phone", "strong": "server_gpu"}
SHARES = {"weak": 0.2, "strong": 0.4}
MBPS = {"weak": (2.0, 0.5), "strong": (20.0, 5.0)}  # down, up


def main() -> int:
    """Measure, print and keep the figures; return the exit code."""
    options = _parser().parse_args()
    return run_script(lambda: _run(options), "interrupted: everything that was started is stopped")


def _run(options: argparse.Namespace) -> int:
    where = machine()
    print(describe(where), flush=True)
    # In seconds of the processor: what else runs here takes none of them.
    speed = measure_speed(compose([*DEFAULTS, *options.overrides]), clock=time.process_time)
    print(f"training steps: {speed.step_flops:.3g} FLOP/s of {speed.gemm_flops:.3g}", flush=True)
    with tempfile.TemporaryDirectory(prefix="hafl-") as name:
        rows = _measure(options, Path(name), speed.step_flops)
    found = {
        "machine": where,
        "load_after": machine()["load"],
        "overrides": [*DEFAULTS, *options.overrides],
        "shares": SHARES,
        "mbps": MBPS,
        "step_flops": speed.step_flops,
        "runs": rows,
    }
    if options.json:
        write_json(options.json, found)
    for row in rows:
        _print(row)
    return 0


def _measure(options: argparse.Namespace, folder: Path, flops: float) -> list[dict[str, Any]]:
    """Return a row a run: what its devices were, and the predicted and the measured rounds."""
    names = [node.name for node in NODES]
    credentials = make_credentials(folder / "credentials", [], names, days=1)
    with ExitStack() as stack:
        deployment = stack.enter_context(local_deployment(credentials, folder / "logs"))
        _start(deployment, stack)
        given = [*options.overrides, f"federation.num_rounds={options.rounds}"]

        def run(name: str, overheads: Mapping[str, float], *more: str) -> dict[str, Any]:
            devices = _devices(flops, overheads)
            output = folder / name
            overrides = [*DEFAULTS, *given, *more, *devices, f"output_dir={output}"]
            deployment.run(
                {"overrides": shlex.join(overrides)}, lambda line: print(line, flush=True)
            )
            return {"name": name, "devices": devices, **_figures(output)}

        # One step: nearly all of it is the start of the node's process, at its share.
        bare = run("one step", dict.fromkeys(names, 0.0), "client.max_steps=1")
        beside = statistics.median(bare["measured"]) - statistics.median(bare["predicted"])
        work = beside * SHARES["weak"]
        overheads = {name: work / share for name, share in SHARES.items()}
        epochs = "client.local_epochs={}".format
        return [bare, *(run(f"{n} epochs", overheads, epochs(n)) for n in (2, 5))]


def _start(deployment: Deployment, stack: ExitStack) -> None:
    deployment.start_superlink()
    deployment.start_fence()
    for name in ("superlink", "fence"):
        stack.enter_context(share_of_processor(deployment.processes[name].pid, None))
    for number, node in enumerate(NODES):
        deployment.register(node.name)
        link = SlowConnection(deployment.fence_port, *MBPS[node.name])
        stack.callback(link.close)
        extra = ["--superlink", f"127.0.0.1:{link.port}"]
        process = deployment.start_node(node, number, len(NODES), extra)
        stack.enter_context(share_of_processor(process.pid, SHARES[node.name]))
    deployment.wait_online(len(NODES))


def _devices(flops: float, overheads: Mapping[str, float]) -> list[str]:
    """Return the nodes as classes of devices, in the place of two that `devices=mixed` has."""
    found = ["devices=mixed"]
    for node in NODES:
        name, (down, up) = node.name, MBPS[node.name]
        values = {
            "peak_flops": flops,
            "reached": SHARES[name],
            "memory_mb": 1e6,
            "down_mbps": down,
            "up_mbps": up,
            "overhead_s": overheads[name],
            "up_to_rank": node.rank,
        }
        place = f"devices.classes.{CLASSES[name]}"
        found += [f"{place}.{key}={value}" for key, value in values.items()]
    return found


def _figures(output: Path) -> dict[str, Any]:
    """Return the rounds' and the trainings' seconds, predicted and measured."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["kind"] == "round" and line["server_round"]]
    clients = [line for line in lines if line["kind"] == "client"]
    return {
        "predicted": [line["simulated_seconds"] for line in rounds],
        "measured": [line["seconds"] for line in rounds],
        "clients": [
            {key: one[key] for key in ("rank", "flops", "seconds", "simulated_seconds")}
            | {"bytes_up": one["bytes_up"], "bytes_down": one["bytes_down"]}
            for one in clients
        ],
    }


def _print(row: Mapping[str, Any]) -> None:
    predicted, measured = (sum(row[key]) for key in ("predicted", "measured"))
    print(
        f"{row['name']}: predicted {predicted:.1f} s, measured {measured:.1f} s in "
        f"{len(row['measured'])} rounds: {predicted / measured - 1:+.0%} "
        f"({_each(row['predicted'])} and {_each(row['measured'])})"
    )


def _each(seconds: Sequence[float]) -> str:
    return ", ".join(f"{one:.1f}" for one in seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="of each run (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to keep the figures")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="settings")
    return parser


if __name__ == "__main__":
    sys.exit(main())
