"""What the programs under `scripts/bench_*.py` measure, and how."""
