"""Time the server's aggregation beside a dense SVD, PEFT's merge and plain QR.

One weight of each size with each group of clients; every way must first give the same matrix.
One thread unless --threads is given.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import run_script  # noqa: E402

CLIENTS = ("5x16", "64,32,16,16,8,8,4,4,4,4", "50x16")


def main() -> int:
    """Measure every case, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[768, 2048, 4096], metavar="N")
    parser.add_argument(
        "--clients",
        type=_ranks,
        nargs="+",
        default=[_ranks(text) for text in CLIENTS],
        metavar="RANKS",
        help=f"ranks of the clients, 5x16 or 8,4,2 (default: {' '.join(CLIENTS)})",
    )
    parser.add_argument("--repeats", type=int, default=15, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-slow-peers", action="store_true", help="leave out dense SVD and PEFT")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    return run_script(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> int:
    import torch
    from benchmarks.aggregation import make_case, measure
    from benchmarks.timing import describe, machine, table, write_json

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device")
    torch.set_num_threads(options.threads)
    where = machine()
    print(describe(where), flush=True)
    results, rows = [], []
    for size in options.sizes:
        for ranks in options.clients:
            case = make_case(size, ranks, options.device)
            timings = measure(case, options.repeats, slow_peers=not options.no_slow_peers)
            mine = timings["ours"].median
            row = {"size and clients": case.name, "ours, ms": str(timings["ours"])}
            for name, timing in timings.items():
                if name != "ours":
                    row[f"{name}, ms"] = str(timing)
                    row[f"{name} / ours"] = f"{timing.median / mine:.2f}"
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append(row)
            seconds = {name: timing.seconds for name, timing in timings.items()}
            results.append({"size": size, "ranks": ranks, "seconds": seconds})
    print(f"\n{table(rows)}")
    if options.json:
        write_json(options.json, {"machine": where, "cases": results})
    return 0


def _ranks(text: str) -> list[int]:
    count, times, rank = text.partition("x")
    try:
        ranks = [int(rank)] * int(count) if times else [int(part) for part in text.split(",")]
    except ValueError:
        ranks = []
    if not ranks or min(ranks) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected such as 5x16 or 8,4,2")
    return ranks


if __name__ == "__main__":
    sys.exit(main())
