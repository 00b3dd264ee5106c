"""Time one client's local training by rank, beside plain PEFT in Hugging Face's Trainer.

All ways must first have the same loss and gradients. Peak memory comes from a process for each.
`--compare-precisions 2 6` instead times fp32, with and without the base model's own dropout, and
bf16, whose rounding must first be small.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import run_script  # noqa: E402

if TYPE_CHECKING:
    from benchmarks.training import Case, Client

CASES = ("2", "8", "64", "64:16", "64:2")
INSTALLED = "minilm"


def main() -> int:
    """Measure every case, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model",
        default=INSTALLED,
        metavar="FOLDER",
        help=f"a base model's folder; tiny: the built-in one (default: {INSTALLED}, where it is "
        "installed, else tiny)",
    )
    parser.add_argument(
        "--cases",
        type=_case,
        nargs="+",
        default=[_case(text) for text in CASES],
        metavar="HELD[:TRAINED]",
        help=f"components, and how many of them are trained (default: {' '.join(CASES)})",
    )
    parser.add_argument("--steps", type=_positive, default=6, metavar="N", help="of a training")
    parser.add_argument("--batch-size", type=_positive, default=32, metavar="N")
    parser.add_argument("--repeats", type=_positive, default=3, metavar="N")
    parser.add_argument("--threads", type=_positive, default=1, metavar="N")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--compare-precisions",
        type=_positive,
        nargs="+",
        metavar="LAYERS",
        help="time fp32 and bf16 with so many layers of the base model instead, without Trainer",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--padded", action="store_true", help="time batches of 48 tokens as well")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--memory-of", metavar="WAY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compare_precisions:
        return run_script(lambda: _compare_precisions(options))
    return run_script(lambda: _memory(options) if options.memory_of else _measure(options))


def _measure(options: argparse.Namespace) -> int:
    import torch
    from benchmarks.timing import describe, machine, table, write_json
    from benchmarks.training import OURS, TRAINER, WAYS, Case, measure

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device")
    torch.set_num_threads(options.threads)
    where, client = machine(), _client(options)
    print(describe(where), flush=True)
    ways = WAYS if options.padded else (OURS, TRAINER)
    rows, results = [], []
    for case in (Case(*pair) for pair in options.cases):
        timings = measure(client, case, ways, options.repeats)
        row = {"components": case.name}
        result: dict[str, object] = {"held": case.held, "trained": case.trained}
        for way in ways:
            timing = timings.get(way)
            row[f"{way}, ms a step"] = str(timing) if timing else "not installed"
            if timing and way != OURS:
                row[f"{way} / ours"] = f"{timing.median / timings[OURS].median:.2f}"
        result["seconds"] = {way: timing.seconds for way, timing in timings.items()}
        if not options.no_memory:
            result["memory_mb"] = memory = {
                way: _memory_in_new_process(options, case, way)
                for way in timings
                if way in (OURS, TRAINER)
            }
            for way, (before, peak) in memory.items():
                row[f"{way}, peak MB"] = f"{peak:.0f} (+{peak - before:.0f})"
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        rows.append(row)
        results.append(result)
    print(f"\n{table(rows)}")
    if options.json:
        write_json(options.json, {"machine": where, "cases": results})
    return 0


def _compare_precisions(options: argparse.Namespace) -> int:
    import torch
    from benchmarks.precision import BF16, FP32, check_rounding, clients, compare
    from benchmarks.timing import describe, machine, table, write_json
    from benchmarks.training import Case

    torch.set_num_threads(options.threads)
    where, folder = machine(), base_folder(options.model)
    print(describe(where), flush=True)
    rows, results = [], []
    for layers in options.compare_precisions:
        ways = clients(folder, layers, options.steps, options.batch_size)
        for case in (Case(*pair) for pair in options.cases):
            loss, gradients = check_rounding(ways[FP32], ways[BF16], case)
            timings = compare(ways, case, options.repeats)
            row = {"layers": str(layers), "components": case.name}
            row |= {f"{way}, ms a step": str(timing) for way, timing in timings.items()}
            row["fp32 / bf16"] = f"{timings[FP32].median / timings[BF16].median:.2f}"
            row |= {"loss differs by": f"{loss:.1e}", "gradients by": f"{gradients:.1e}"}
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append(row)
            seconds = {way: timing.seconds for way, timing in timings.items()}
            results.append({"layers": layers, "case": case.name, "seconds": seconds})
    print(f"\n{table(rows)}")
    if options.json:
        write_json(options.json, {"machine": where, "cases": results})
    return 0


def _client(options: argparse.Namespace) -> "Client":
    from benchmarks.training import make_client

    from hafl_app.training.settings import TrainOptions

    train = TrainOptions(batch_size=options.batch_size, precision=options.precision)
    return make_client(base_folder(options.model), options.steps, train, options.device)


def base_folder(model: str) -> Path | None:
    """Return the base model's folder; None for the built-in one."""
    from hafl_app.config.compose import compose
    from hafl_app.run import build
    from hafl_app.training.locate import ModelError, locate

    if model == "tiny":
        return None
    if model != INSTALLED:
        return Path(model)
    try:
        return locate(build.base_spec(compose([f"model={INSTALLED}"])))
    except ModelError as error:
        print(f"{error}; measuring the built-in model", file=sys.stderr)
        return None


def _memory_in_new_process(
    options: argparse.Namespace, case: "Case", way: str
) -> tuple[float, float]:
    command = [sys.executable, __file__, "--memory-of", way, "--model", options.model]
    command += ["--cases", f"{case.held}:{case.trained}", "--steps", str(options.steps)]
    command += ["--batch-size", str(options.batch_size), "--threads", str(options.threads)]
    command += ["--precision", options.precision, "--device", options.device]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    before, peak = json.loads(done.stdout.splitlines()[-1])
    return before, peak


def _memory(options: argparse.Namespace) -> int:
    import torch
    from benchmarks.training import Case, memory_growth_mb

    torch.set_num_threads(options.threads)
    client = _client(options)
    print(json.dumps(memory_growth_mb(client, Case(*options.cases[0]), options.memory_of)))
    return 0


def _case(text: str) -> tuple[int, int]:
    held, _, trained = text.partition(":")
    pair = [int(part) if part.isdecimal() else 0 for part in (held, trained or held)]
    if not 1 <= pair[1] <= pair[0]:
        raise argparse.ArgumentTypeError(f"{text!r}: expected such as 8, or 64:16")
    return pair[0], pair[1]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
