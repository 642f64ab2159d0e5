"""The transformer that carries the words into the picture."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.nn.attention import Attention


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another (arXiv:2002.05202): (..., C) -> (..., inner)."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        gated: Tensor = value * F.gelu(gate)
        return gated


class FeedForward(nn.Module):
    """GEGLU to four times the width and back: (..., C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # the published names are `net.0` and `net.2`: a dropout stood between them
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net[2](self.net[0](x))
        return out


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; each after a norm, each with its residual.

    x (B, N, C), context (B, M, D) -> (B, N, C)
    """

    def __init__(self, channels: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context=context)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map: (B, C, H, W), (B, M, D) -> (B, C, H, W).

    `linear`: SD 2 and XL store the projections as linear layers, SD 1 as 1x1 convolutions; the maths is one.
    """

    def __init__(self, channels: int, heads: int, context: int, *, depth: int, linear: bool, groups: int = 32) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, heads, context) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = _projected(self.proj_in, self.norm(x).flatten(2).transpose(1, 2))  # (B, HW, C)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + _projected(self.proj_out, tokens).transpose(1, 2).reshape(x.shape)


def _projected(layer: nn.Linear | nn.Conv2d, tokens: Tensor) -> Tensor:
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)
