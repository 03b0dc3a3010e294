"""Compute kernels: each op is a schema, a plain-PyTorch meaning, and a native version that is bit-equal."""
