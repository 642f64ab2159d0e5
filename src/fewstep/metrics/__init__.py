"""Numbers about images: tensors in, measures with their intervals out."""
