"""Metrics of generated images and of votes on them, with confidence intervals."""
