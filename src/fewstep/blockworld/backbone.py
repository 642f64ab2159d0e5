"""The convolutions with which the small networks of this room begin, and how pictures come to them."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import InputError

SIDE = 64
"""Pixels of the pictures that the networks see."""
SMALLEST = 32
CHANNELS = (32, 48, 64, 80)
GROUPS = 8


class Backbone(nn.Module):
    """Pictures (B, 3, 64, 64) in [-1, 1] -> three maps: (B, 48, 16, 16), (B, 64, 8, 8) and (B, 80, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS[0], 3, stride=2, padding=1)
        self.down = nn.ModuleList(_halving(a, b) for a, b in pairwise(CHANNELS))

    def forward(self, pictures: Tensor) -> list[Tensor]:
        x, maps = F.relu(self.stem(pictures)), list[Tensor]()
        for layer in self.down:
            x = layer(x)
            maps.append(x)
        return maps


class Residual(nn.Module):
    """Two normed 3x3 convolutions and their input: (B, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(GROUPS, channels)
        self.norm2 = nn.GroupNorm(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x)))
        h = self.conv2(F.relu(self.norm2(h)))
        out: Tensor = x + h
        return out


def _halving(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride=2, padding=1), Residual(out))


def resized(pictures: Tensor, side: int = SIDE) -> Tensor:
    """Square pictures (B, 3, S, S) in [-1, 1] as (B, 3, side, side): bicubic, antialiased.

    Raises InputError for other shapes, and for S under 32.
    """
    shape = tuple(pictures.shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or shape[3] < SMALLEST:
        raise InputError(f"pictures have shape {shape}; expected (B, 3, S, S) with S of at least {SMALLEST}")
    if shape[3] == side:
        return pictures.float()
    smooth: Tensor = F.interpolate(pictures.float(), (side, side), mode="bicubic", antialias=True)
    return smooth.clamp(-1, 1)
