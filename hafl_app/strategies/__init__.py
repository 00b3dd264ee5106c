"""Aggregation methods, one a file, on the template that they share in `base.py`."""
