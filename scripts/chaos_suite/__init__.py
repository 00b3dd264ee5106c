"""A federation under faults: kinds, schedules, runs and their report, for `scripts/chaos.py`."""
