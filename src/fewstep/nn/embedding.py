"""Sinusoidal features of a number, and the two-layer network behind them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal_embedding(values: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of `values` at `width / 2` frequencies from 1 down to 1/10000.

    values (N,) -> (N, width) float32. Source: arXiv:2006.11239; cosines first as in the released Stable
    Diffusion code.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=values.device))
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between: (B, features) -> (B, width)."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(features, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        hidden: Tensor = self.linear_2(F.silu(self.linear_1(features)))
        return hidden
