"""Federated LoRA fine-tuning when clients differ: a Flower app."""
