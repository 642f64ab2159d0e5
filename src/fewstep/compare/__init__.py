"""Blind comparisons of models: pairs of images, votes on them, and preference statistics."""
