"""The KL autoencoder between pictures and latents (arXiv:2112.10752, sec. 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from fewstep.models.config import AutoencoderConfig
from fewstep.nn.attention import PixelAttention
from fewstep.nn.convolution import Downsample, Upsample, normed_conv
from fewstep.nn.resblock import ResBlock

EPS = 1e-6  # of every norm in the autoencoder; the UNet's is 1e-5


@dataclass(frozen=True)
class Posterior:
    """The normal distribution of a picture's unscaled latents: mean and log-variance, both (B, latent_channels, h, w).

    Its mode is `mean`. The log-variance is clamped to [-30, 20].
    """

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> Posterior:
        """From what `AutoencoderKL.encode` returns, (B, 2 * latent_channels, h, w)."""
        mean, log_variance = moments.chunk(2, dim=1)
        return cls(mean, log_variance.clamp(-30, 20))

    def sample(self, noise: Tensor) -> Tensor:
        """Latents for standard normal `noise`, both of the mean's shape."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self) -> Tensor:
        """The Kullback-Leibler divergence from N(0, 1) of each latent, of the mean's shape."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance)


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
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = _levels(channels, config.resnets, groups, partial(Downsample, padding=0))
        self.mid_block = MiddleBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return normed_conv(self.conv_norm_out, self.conv_out, self.mid_block(x))


class Decoder(nn.Module):
    """latents (B, latent_channels, h, w) -> image (B, 3, 8h, 8w)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.channels, config.groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.mid_block = MiddleBlock(channels[-1], groups)
        self.up_blocks = _levels(channels[::-1], config.resnets + 1, groups, Upsample)
        self.conv_norm_out = nn.GroupNorm(groups, channels[0], EPS)
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return normed_conv(self.conv_norm_out, self.conv_out, x)


class Level(nn.Module):
    """Residual blocks, then the change of resolution: x (B, channels, h, w) -> (B, out, h/2, w/2) or (B, out, 2h, 2w).

    `change` is None at the end of the encoder and of the decoder.
    """

    def __init__(self, widths: Sequence[int], groups: int, change: Downsample | Upsample | None) -> None:
        super().__init__()
        self.resnets = _resblocks(widths, groups)
        self.downsamplers = nn.ModuleList([change] if isinstance(change, Downsample) else [])
        self.upsamplers = nn.ModuleList([change] if isinstance(change, Upsample) else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class MiddleBlock(nn.Module):
    """A residual block, attention over the pixels, a residual block: x (B, C, h, w)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(channels, groups=groups)])
        self.resnets = _resblocks([channels] * 3, groups)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.resnets[1](self.attentions[0](self.resnets[0](x)))
        return out


def _levels(
    channels: Sequence[int], resnets: int, groups: int, change: Callable[[int], Downsample | Upsample]
) -> nn.ModuleList:
    """A level for each of `channels` in their order; all but the last end with a `change`."""
    steps = enumerate(pairwise((channels[0], *channels)), start=1)
    return nn.ModuleList(
        Level([before, *[after] * resnets], groups, change(after) if i < len(channels) else None)
        for i, (before, after) in steps
    )


def _resblocks(widths: Sequence[int], groups: int) -> nn.ModuleList:
    return nn.ModuleList(ResBlock(before, after, groups=groups, eps=EPS) for before, after in pairwise(widths))
