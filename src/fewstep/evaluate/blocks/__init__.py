"""The benchmark of block models."""
