"""Time a language model's training step on batches of similar length, padded and without padding.

The ways must first have the same gradients. Settings are those of a run, e.g. model=smollm2
dataset=dolly dataset.path=FOLDER dataset.max_length=192 client.batch_size=8.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import run_script  # noqa: E402

_SEED = 1


def main() -> int:
    """Measure some batches of the first client's, and print padding and times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="+", metavar="SETTING=VALUE")
    parser.add_argument("--batches", type=int, default=4, metavar="N", help="(default: 4)")
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="(default: 2)")
    options = parser.parse_args()
    if min(options.batches, options.repeats) < 1:
        parser.error("--batches and --repeats: expected at least 1")
    return run_script(lambda: _measure(options.settings, options.batches, options.repeats))


def _measure(overrides: Sequence[str], number: int, repeats: int) -> int:
    import numpy as np
    import torch
    from benchmarks.packing import PADDED, batches_of, measure
    from benchmarks.timing import describe, machine, table
    from benchmarks.training import Case

    from hafl_app.config.compose import compose
    from hafl_app.run import build
    from hafl_app.training.causal import LoraCausalLM
    from hafl_app.training.device import resolve_precision

    settings = compose([*overrides, "client.device=cpu"])
    if settings.model.task != "causal_lm":
        raise ValueError(f"model.task={settings.model.task}: expected causal_lm")
    torch.set_num_threads(settings.client.num_threads)
    text = build.federated_text(settings, settings.federation.num_clients)
    examples, model = text.train(0), build.model(settings, len(text.label_names))
    assert isinstance(model, LoraCausalLM), "the task says so"
    case = Case(settings.lora.max_rank, settings.lora.max_rank)
    model.load(case.adapter(model), case.plan(model))
    model.train()
    precision = resolve_precision(settings.client.precision, model.device)
    size = settings.client.batch_size
    chosen, ours, shuffled = batches_of(examples, size, number, _SEED)
    rows = np.concatenate(chosen)
    counted = model.num_targets(examples, rows) / np.diff(examples.offsets)[rows].sum()
    print(describe(machine()))
    print(f"{settings.model.name}, {case.name}, {precision}; {number} batches of {size} rows,")
    print(f"{counted:.0%} of their tokens count; padding {ours:.1%}, shuffled {shuffled:.1%}")
    timings = [measure(model, examples, rows, precision, repeats) for rows in chosen]
    lines = []
    for name in timings[0]:
        ratios = [timing[name].median / timing[PADDED].median for timing in timings]
        seconds = sum(timing[name].median for timing in timings) / number
        lines.append(
            {
                "way": name,
                "CPU ms a step": f"{1e3 * seconds:.4g}",
                "over padded": f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
            }
        )
    print(f"\n{table(lines)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
