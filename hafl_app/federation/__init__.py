"""Flower plumbing: the wire codec, node profiles, sampling, the ledger, and the two engines."""
