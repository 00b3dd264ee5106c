"""Many federations at once: comparisons of methods, rank collapse, the centralized reference."""
