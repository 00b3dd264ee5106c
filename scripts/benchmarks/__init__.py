"""Measurements of the programs under `scripts/bench_*.py`."""
