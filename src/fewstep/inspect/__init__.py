"""What an image was generated with, what a checkpoint is, and what the catalogue holds; no weights are loaded."""
