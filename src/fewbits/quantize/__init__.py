"""Change the precision of a model."""
