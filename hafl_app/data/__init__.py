"""Labeled text: where it comes from, how clients share it, and its tokens."""
