"""Combinations of settings that are refused, a file for each subject."""
