"""Trackers of a run's metrics: files, the terminal, Weights & Biases.

`base` has the interface and the records; every other module is one tracker. Trackers live in
the server process alone.
"""
