"""Base models, PEFT adapters, local training and evaluation: torch, transformers and peft only."""
