"""A node's side: handlers of its messages, and its limits."""
