"""Engines of a federation: in this process, Flower's simulation, or a Ray cluster."""
