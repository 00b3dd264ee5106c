"""Where a federation runs: in this process, under Flower's simulation, on a Ray cluster."""
