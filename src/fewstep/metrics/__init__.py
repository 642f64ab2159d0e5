"""Numbers about pictures: tensors in, measures with their intervals out."""
