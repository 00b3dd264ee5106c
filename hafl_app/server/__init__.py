"""The machinery every strategy uses: participation, requests, replies, aggregation, checkpoints."""
