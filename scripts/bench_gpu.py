"""Time training steps of a 1.1 B-parameter Llama shape on a GPU, and the server's aggregation.

Beside plain PEFT in Hugging Face's Trainer and the device's own matrix products; and clients that
train together, beside one at a time. Weights are
random; needed are torch, transformers and peft, but neither flwr nor ray. Without a CUDA device the
table says so; --device cpu --tiny runs everything in small.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import run_script  # noqa: E402

if TYPE_CHECKING:
    from benchmarks.training import Client

LOADS = ("2:8x512", "8:8x512", "64:8x512", "8:1x512", "8:8x2048")
TINY_LOADS = ("2:2x16", "8:2x16")
# Small clients, who leave the device idle, and in how many together.
CLIENTS, COHORTS = ("8:8x32", "8:8x256"), (1, 4, 16, 64)
TINY_CLIENTS, TINY_COHORTS = ("2:2x16",), (1, 2)


def main() -> int:
    """Measure every load, and print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--loads",
        type=_load,
        nargs="+",
        metavar="RANK:BATCHxTOKENS",
        help=f"default: {' '.join(LOADS)}",
    )
    parser.add_argument("--steps", type=_positive, default=20, metavar="N", help="of a training")
    parser.add_argument("--repeats", type=_positive, default=3, metavar="N")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model and loads for a smoke test")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    # Trainer would spread a batch over all devices.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    return run_script(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> int:
    import torch
    from benchmarks import cohort, gpu
    from benchmarks.timing import describe, machine, table, write_json

    texts = TINY_LOADS if options.tiny else LOADS
    loads = [gpu.Load(*load) for load in options.loads or [_load(text) for text in texts]]
    where = machine()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured", flush=True)
        print(f"\n{table(gpu.unmeasured(loads))}")
        cases = [cohort.unmeasured(COHORTS, clients=text) for text in CLIENTS]
        print(f"\n{table([row for case in cases for row in case])}")
        return 0
    print(describe(where), flush=True)
    device = torch.device(options.device)
    shape = gpu.SMOKE if options.tiny else gpu.TINY_LLAMA
    gpu.check(shape, device, sorted({load.rank for load in loads}))
    limit = gpu.peak_flops(device, 256 if options.tiny else 8192)
    print(f"matmul limit: {limit / 1e12:.3g} TFLOP/s", flush=True)
    client, rows, results = gpu.make_client(shape, device), [], []
    for load in loads:
        work = gpu.flops(client, load)
        steps = gpu.measure(client, load, steps=options.steps, repeats=options.repeats)
        for way, step in steps.items():
            rows.append(gpu.row(load, step, way, limit, work))
            print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
            seconds = step.timing.seconds if step.timing else step.missing
            results.append({"way": way, "seconds": seconds, "peak_mb": step.peak_mb, "flops": work})
    together = _cohorts(client, options)
    del client
    gpu.release(device)
    merged = gpu.aggregate([64] if options.tiny else [2048, 4096], device, options.repeats)
    print(f"\n{table(rows)}\n\n{table(together)}\n\n{table(merged)}")
    if options.json:
        found = {"machine": where, "limit": limit, "steps": results, "aggregation": merged}
        found["cohorts"] = together
        write_json(options.json, found)
    return 0


def _cohorts(client: "Client", options: argparse.Namespace) -> list[dict[str, object]]:
    """Return the table of clients that train together."""
    from benchmarks import cohort, gpu

    sizes = TINY_COHORTS if options.tiny else COHORTS
    rows = []
    for text in TINY_CLIENTS if options.tiny else CLIENTS:
        load = gpu.Load(*_load(text))
        timings = gpu.measure_cohorts(client, load, sizes, steps=3, repeats=options.repeats)
        rows += cohort.rows(timings, clients=text)
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def _load(text: str) -> tuple[int, int, int]:
    rank, _, rows = text.partition(":")
    parts = (rank, *rows.split("x"))
    numbers = [int(part) if part.isdecimal() else 0 for part in parts]
    if len(numbers) != 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected such as 8:4x512")
    return numbers[0], numbers[1], numbers[2]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
