"""Training: losses, the moving average, checkpoints and one plain loop."""
