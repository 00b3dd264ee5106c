"""One aggregation method a file, on the template that they share in `base.py`."""
