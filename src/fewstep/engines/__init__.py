"""Engines run the four parts of a model: text encoder, UNet, decoder, encoder."""
