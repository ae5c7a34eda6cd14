"""Checkpoints of models: what they say of themselves, and reading parts of them."""
