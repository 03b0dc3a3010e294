"""Adapters: families that transformers does not carry, presented as ones it does. No code of a checkpoint is run."""
