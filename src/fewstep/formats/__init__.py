"""Files of tensors as they come from anywhere: safetensors and torch archives, parsed without trusting them."""
