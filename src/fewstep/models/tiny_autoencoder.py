"""The tiny autoencoder: a distilled encoder and decoder of 1.2 million parameters each, or fewer (TAESD's layout).

Source: github.com/madebyollin/taesd. Parameter names are those of a diffusers `AutoencoderTiny`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TinyAutoencoder(nn.Module):
    """Pictures to latents and back, without attention or norms; latents are scaled already (factor 1)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.width = width
        self.encoder = TinyEncoder(width)
        self.decoder = TinyDecoder(width)

    def encode(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) in [-1, 1] -> latents (B, 4, H/8, W/8)."""
        latents: Tensor = self.encoder(image)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, 4, h, w) -> image (B, 3, 8h, 8w), about [-1, 1]."""
        image: Tensor = self.decoder(latents)
        return image


class TinyEncoder(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> latents (B, 4, H/8, W/8), by strided convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), TinyBlock(width)]
        for _ in range(3):
            halve = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
            layers += [halve, TinyBlock(width), TinyBlock(width), TinyBlock(width)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 4, 3, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        latents: Tensor = self.layers((image + 1) / 2)
        return latents


class TinyDecoder(nn.Module):
    """Latents (B, 4, h, w), soft-clipped to [-3, 3] -> image (B, 3, 8h, 8w), by nearest upsampling."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(4, width, 3, padding=1), nn.ReLU()]
        for _ in range(3):
            double = nn.Upsample(scale_factor=2.0)
            layers += [
                TinyBlock(width),
                TinyBlock(width),
                TinyBlock(width),
                double,
                nn.Conv2d(width, width, 3, padding=1, bias=False),
            ]
        self.layers = nn.Sequential(*layers, TinyBlock(width), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, latents: Tensor) -> Tensor:
        image: Tensor = self.layers(torch.tanh(latents / 3) * 3)
        return image * 2 - 1


class TinyBlock(nn.Module):
    """Three 3x3 convolutions with ReLU, and a residual: x (B, width, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)
