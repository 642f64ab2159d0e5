"""FID against CLIP score over guidance scales."""
