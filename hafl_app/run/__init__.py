"""One run, from settings to results."""
