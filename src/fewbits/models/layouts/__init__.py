"""Checkpoint layouts, one file each: how a quantized model is written and read."""
