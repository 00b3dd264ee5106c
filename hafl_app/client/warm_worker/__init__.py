"""A process beside a SuperNode that keeps the base model loaded between messages."""
