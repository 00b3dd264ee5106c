"""Adapters for others to use: merged, cut to a rank, with a model card, on the hub."""
