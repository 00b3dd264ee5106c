"""Time the clients' influence on a round's step, exact and from projected factors.

In CPU seconds of one thread, under adaptive aggregation; and what is kept of a client with
projections, beside its update, and how far its share is then from the exact one.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import run_script  # noqa: E402


def main() -> int:
    """Measure, and print a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=50, metavar="N")
    parser.add_argument("--layers", type=int, default=2, metavar="N")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    options = parser.parse_args()
    return run_script(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> int:
    import torch
    from benchmarks.influence import Round
    from benchmarks.timing import describe, machine, time_in_turn

    for name in ("clients", "layers", "repeats"):
        if (value := getattr(options, name)) < 1:
            raise ValueError(f"--{name}: {value}: expected at least 1")
    torch.set_num_threads(1)
    print(describe(machine()), flush=True)
    one = Round(options.clients, options.layers)
    jobs = {
        "exact": lambda: one.influences(projects=False),
        "projected": lambda: one.influences(projects=True),
    }
    timings = time_in_turn(jobs, options.repeats, clock=time.process_time)
    exact, close = jobs["exact"](), jobs["projected"]()
    error = max(abs(a.share - b.share) for a, b in zip(exact, close, strict=True))
    kept, upload = one.kept_bytes()
    print(f"{options.clients} clients of ranks {sorted(set(one.ranks))}, {options.layers} layers")
    print("CPU ms: " + ", ".join(f"{name} {timing}" for name, timing in timings.items()))
    print(f"kept of a client: {kept / 1e3:.1f} kB of {upload / 1e3:.1f} kB; error {error:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
