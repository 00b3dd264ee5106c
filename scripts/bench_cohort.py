"""Time the local training of many clients: one at a time, and in cohorts that share their passes.

Every client must first change its factors as it does alone. Texts have BANKING77's lengths; all
clients are trained in every way, by turns.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import run_script  # noqa: E402

if TYPE_CHECKING:
    from benchmarks.training import Client

INSTALLED = "minilm"
SIZES = {"cpu": (1, 4, 16), "cuda": (1, 4, 16, 64)}


def main() -> int:
    """Measure every batch size, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model",
        default=INSTALLED,
        metavar="FOLDER",
        help=f"a base model's folder; tiny: the built-in one (default: {INSTALLED})",
    )
    parser.add_argument("--layers", type=_positive, metavar="N", help="default: all")
    parser.add_argument("--rank", type=_positive, default=8, metavar="N")
    parser.add_argument("--batch-sizes", type=_positive, nargs="+", default=[8, 16], metavar="N")
    parser.add_argument("--sizes", type=_positive, nargs="+", metavar="K", help="of cohorts")
    parser.add_argument("--steps", type=_positive, default=5, metavar="N", help="of a client")
    parser.add_argument("--repeats", type=_positive, default=3, metavar="N")
    parser.add_argument("--threads", type=_positive, default=1, metavar="N")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    return run_script(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> int:
    import torch
    from benchmarks import cohort
    from benchmarks.timing import describe, machine, table, write_json

    sizes = options.sizes or SIZES[options.device]
    if options.device == "cuda" and not torch.cuda.is_available():
        cases = [cohort.unmeasured(sizes, batch=batch) for batch in options.batch_sizes]
        print("no CUDA device: nothing is measured", flush=True)
        print(f"\n{table([row for case in cases for row in case])}")
        return 0
    torch.set_num_threads(options.threads)
    where, rows, results = machine(), [], []
    print(describe(where), flush=True)
    for batch in options.batch_sizes:
        client, texts = _clients(options, batch, max(sizes))
        tasks = cohort.tasks_of(client, texts, options.rank)
        cohort.check(client, tasks)
        timings = cohort.measure(client, tasks, sizes, options.repeats)
        for row in cohort.rows(timings, batch=batch):
            rows.append(row)
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        results += [
            {"batch": batch, "cohort": way, "seconds": timing.seconds}
            for way, timing in timings.items()
        ]
    print(f"\n{table(rows)}")
    if options.json:
        write_json(options.json, {"machine": where, "clients": results})
    return 0


def _clients(options: argparse.Namespace, batch: int, number: int) -> tuple["Client", list[Any]]:
    """Return the base model with its options, and the texts of so many clients."""
    from bench_training import base_folder
    from benchmarks.cohort import shares_of
    from benchmarks.training import make_client

    from hafl_app.training.settings import TrainOptions

    train_options = TrainOptions(batch_size=batch, precision=options.precision)
    base = {} if options.layers is None else {"num_layers": options.layers}
    folder, steps = base_folder(options.model), options.steps * number
    client = make_client(folder, steps, train_options, options.device, **base)
    return client, shares_of(client.texts, number)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
