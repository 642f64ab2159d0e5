"""Blind comparisons: pairs of pictures, votes, and what they say."""
