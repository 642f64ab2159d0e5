"""Training data: worlds that are drawn on the fly, and the readers of picture collections."""
