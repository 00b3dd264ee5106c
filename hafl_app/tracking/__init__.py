"""Trackers of a run's metrics: files, the terminal, Weights & Biases, a picture.

`base` says what a tracker is told; every other module is one place to tell it to. Trackers live in
the server process alone.
"""
