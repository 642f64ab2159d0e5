"""The UNet of Stable Diffusion 1, 2, XL, its refiner, the turbo models and the small ones (arXiv:2112.10752)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.models.config import Stage, UNetConfig
from fewstep.nn.convolution import Downsample, Upsample, normed_conv
from fewstep.nn.embedding import TimestepEmbedding, sinusoidal_embedding
from fewstep.nn.resblock import ResBlock
from fewstep.nn.transformer import SpatialTransformer


class UNet(nn.Module):
    """Predicts noise, velocity or the clean latents, whichever it was trained for, from noisy latents and text.

    x (B, in_channels, h, w), t (B,) from 0 (clean) to 999 (noise) and anything between, context (B, M, config.context),
    pooled (B, P) and sizes (B, 6 or 5) for SDXL only -> (B, out_channels, h, w). Parameter names are those of a
    diffusers `UNet2DConditionModel`.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        stages, last = config.stages, len(config.stages) - 1
        first = stages[0].channels
        self.time_embedding = TimestepEmbedding(first, config.emb)
        self.add_embedding = TimestepEmbedding(config.addition, config.emb) if config.addition else None
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(config, stages[max(i - 1, 0)].channels, stage, halve=i < last) for i, stage in enumerate(stages)
        )
        self.mid_block = MidBlock(config)
        # channels of each feature map that the way down leaves for the way up; the last level is not halved
        skips = [first, *(stage.channels for stage in stages for _ in range(stage.resnets + 1))][:-1]
        self.up_blocks = nn.ModuleList(
            UpBlock(config, stages[min(i + 1, last)].channels, stages[i], skips, double=i > 0)
            for i in reversed(range(len(stages)))
        )
        self.conv_norm_out = nn.GroupNorm(config.groups, first, eps=1e-5)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        emb = self.embedding(t, x.dtype, pooled, sizes)
        x = self.conv_in(x)
        skips = [x]
        for down in self.down_blocks:
            x = down(x, emb, context, skips)
        x = self.mid_block(x, emb, context)
        for up in self.up_blocks:
            x = up(x, emb, context, skips)
        return normed_conv(self.conv_norm_out, self.conv_out, x)

    def embedding(self, t: Tensor, dtype: torch.dtype, pooled: Tensor | None, sizes: Tensor | None) -> Tensor:
        """(B, emb): what every residual block is told of the time step, and with SDXL of pooled text and sizes."""
        emb: Tensor = self.time_embedding(sinusoidal_embedding(t, self.config.stages[0].channels).to(dtype))
        if self.add_embedding is None:
            return emb
        assert pooled is not None, "SDXL needs the pooled text embedding"
        assert sizes is not None, "SDXL needs the size conditioning"
        features = sinusoidal_embedding(sizes.flatten(), self.config.size_features).reshape(len(sizes), -1)
        added: Tensor = self.add_embedding(torch.cat([pooled, features.to(dtype)], dim=-1))
        return emb + added


class DownBlock(nn.Module):
    """One level on the way down: residual blocks, each with its transformer, then the halving.

    x (B, channels, h, w) -> (B, stage.channels, h/2, w/2); appends each of its feature maps to `skips`.
    """

    def __init__(self, config: UNetConfig, channels: int, stage: Stage, *, halve: bool) -> None:
        super().__init__()
        widths = [channels, *[stage.channels] * (stage.resnets - 1)]
        self.resnets = nn.ModuleList(_resblock(config, width, stage.channels) for width in widths)
        self.attentions = _transformers(config, stage, stage.resnets)
        self.downsamplers = nn.ModuleList([Downsample(stage.channels)] if halve else [])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    """The bottom: a residual block, a transformer, a residual block: x (B, C, h, w)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        stage = config.stages[-1]
        middle = Stage(channels=stage.channels, depth=config.mid_depth, heads=stage.heads)
        self.attentions = _transformers(config, middle, 1)
        self.resnets = nn.ModuleList(_resblock(config, stage.channels, stage.channels) for _ in range(2))

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, emb)
        for attention in self.attentions:
            x = attention(x, context)
        out: Tensor = self.resnets[1](x, emb)
        return out


class UpBlock(nn.Module):
    """One level on the way up: each residual block reads a skip connection; then the doubling.

    x (B, channels, h, w) -> (B, stage.channels, 2h, 2w), or the size of the next skip connection; pops from `skips`
    one feature map more than the level's way down had residual blocks.
    """

    def __init__(self, config: UNetConfig, channels: int, stage: Stage, skips: list[int], *, double: bool) -> None:
        super().__init__()
        widths = [channels, *[stage.channels] * stage.resnets]
        self.resnets = nn.ModuleList(_resblock(config, width + skips.pop(), stage.channels) for width in widths)
        self.attentions = _transformers(config, stage, stage.resnets + 1)
        self.upsamplers = nn.ModuleList([Upsample(stage.channels)] if double else [])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), emb)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            x = upsample(x, (skips[-1].shape[2], skips[-1].shape[3]))
        return x


def _resblock(config: UNetConfig, channels: int, out: int) -> ResBlock:
    return ResBlock(channels, out, emb=config.emb, groups=config.groups)


def _transformers(config: UNetConfig, stage: Stage, count: int) -> nn.ModuleList:
    return nn.ModuleList(
        SpatialTransformer(
            stage.channels,
            stage.heads,
            config.context,
            depth=stage.depth,
            linear=config.linear_projection,
            groups=config.groups,
        )
        for _ in range(count if stage.depth else 0)
    )
