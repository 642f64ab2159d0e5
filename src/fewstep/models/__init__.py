"""The networks of the Stable Diffusion family, each built from one frozen config."""
