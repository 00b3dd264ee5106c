"""What a node does with a message."""
