"""Halving and doubling the resolution."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn


@runtime_checkable
class NormedConv(Protocol):
    """A convolution of an engine that computes norm, SiLU and itself in one pass."""

    def normed(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """The convolution of `silu(norm(x))`."""


def normed_conv(norm: nn.GroupNorm, conv: nn.Module, x: Tensor) -> Tensor:
    """`conv(silu(norm(x)))`, in one pass where an engine has put a `NormedConv` in the convolution's place."""
    if isinstance(conv, NormedConv):
        return conv.normed(norm, x)
    return conv(F.silu(norm(x)))  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)).

    The UNet pads all sides by one (`padding=1`); the autoencoder pads only right and bottom (`padding=0`), so
    there H and W must be even.
    """

    def __init__(self, channels: int, *, padding: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))
        halved: Tensor = self.conv(x)
        return halved


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W).

    `size` says otherwise where an odd size was halved before.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None or size == (2 * x.shape[2], 2 * x.shape[3]):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        else:
            x = F.interpolate(x, size=size, mode="nearest")
        doubled: Tensor = self.conv(x)
        return doubled
