"""The run of a federation, from settings to results."""
