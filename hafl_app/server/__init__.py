"""What every strategy uses: who takes part, requests, replies, aggregation, checkpoints."""
