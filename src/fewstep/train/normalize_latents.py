"""Giving the latents of a trained autoencoder mean 0 and variance 1, channel by channel."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.models.autoencoder import AutoencoderKL


@torch.no_grad()
def normalize_latents(model: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Make `model` encode to `(latents - mean) / std` and decode from that; mean, std (latent_channels,).

    Only the 1x1 convolutions around the latents change, by exact linear algebra: what is decoded from what is
    encoded stays the same, log-variances follow. A single scaling factor would leave the channels' means in.
    """
    count = len(mean)
    quant, post = model.quant_conv, model.post_quant_conv
    assert quant.bias is not None
    assert post.bias is not None
    quant.weight[:count] /= std[:, None, None, None]
    quant.bias[:count] = (quant.bias[:count] - mean) / std
    quant.bias[count:] -= 2 * std.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]
