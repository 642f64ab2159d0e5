"""The KL autoencoder between pictures and latents (arXiv:2112.10752, sec. 3.1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.models.config import AutoencoderConfig
from fewstep.nn.attention import PixelAttention
from fewstep.nn.convolution import Downsample, Upsample
from fewstep.nn.resblock import ResBlock

EPS = 1e-6  # of every norm in the autoencoder; the UNet's is 1e-5


class AutoencoderKL(nn.Module):
    """Encodes pictures to the mean and log-variance of latents, and decodes latents.

    Parameter names are those of a diffusers `AutoencoderKL`. Latents are unscaled here: the pipeline multiplies by
    `config.scaling_factor`.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def encode(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) in [-1, 1] -> (B, 2 * latent_channels, H/8, W/8): means, then log-variances."""
        moments: Tensor = self.quant_conv(self.encoder(image))
        return moments

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, latent_channels, h, w), unscaled -> image (B, 3, 8h, 8w), about [-1, 1]."""
        image: Tensor = self.decoder(self.post_quant_conv(latents))
        return image


class Encoder(nn.Module):
    """image (B, 3, H, W) -> (B, 2 * latent_channels, H/8, W/8)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.channels, config.groups
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            EncoderBlock(channels[max(i - 1, 0)], width, config, halve=i < last) for i, width in enumerate(channels)
        )
        self.mid_block = MiddleBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """image (B, 3, H, W) -> (B, 2 * latent_channels, H/8, W/8)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        moments: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return moments


class Decoder(nn.Module):
    """latents (B, latent_channels, h, w) -> image (B, 3, 8h, 8w)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.channels, config.groups
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.mid_block = MiddleBlock(channels[-1], groups)
        self.up_blocks = nn.ModuleList(
            DecoderBlock(channels[min(i + 1, last)], channels[i], config, double=i > 0)
            for i in reversed(range(len(channels)))
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[0], EPS)
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """latents (B, latent_channels, h, w) -> image (B, 3, 8h, 8w)."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        image: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return image


class EncoderBlock(nn.Module):
    """Residual blocks of one level, then the halving."""

    def __init__(self, channels: int, out: int, config: AutoencoderConfig, *, halve: bool) -> None:
        super().__init__()
        self.resnets = _resblocks(channels, out, config.resnets, config.groups)
        self.downsamplers = nn.ModuleList([Downsample(out, padding=0)] if halve else [])

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> (B, out, h/2, w/2)."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class DecoderBlock(nn.Module):
    """Residual blocks of one level, then the doubling."""

    def __init__(self, channels: int, out: int, config: AutoencoderConfig, *, double: bool) -> None:
        super().__init__()
        self.resnets = _resblocks(channels, out, config.resnets + 1, config.groups)
        self.upsamplers = nn.ModuleList([Upsample(out)] if double else [])

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> (B, out, 2h, 2w)."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MiddleBlock(nn.Module):
    """A residual block, attention over the pixels, a residual block."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(channels, groups=groups)])
        self.resnets = _resblocks(channels, channels, 2, groups)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> (B, C, h, w)."""
        out: Tensor = self.resnets[1](self.attentions[0](self.resnets[0](x)))
        return out


def _resblocks(channels: int, out: int, count: int, groups: int) -> nn.ModuleList:
    widths = [channels, *[out] * (count - 1)]
    return nn.ModuleList(ResBlock(width, out, groups=groups, eps=EPS) for width in widths)
