"""What a node does with a message: in this process, or in a worker that stays warm."""
