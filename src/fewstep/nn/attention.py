"""Attention over tokens, and over the pixels of a feature map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention of `x` to `context`, or to itself: (B, N, C), (B, M, D) -> (B, N, C)."""

    def __init__(self, channels: int, heads: int, *, context: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context or channels, channels, bias=False)
        self.to_v = nn.Linear(context or channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # the published names say `to_out.0`

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        rows = (self.to_q(x), self.to_k(source), self.to_v(source))
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in rows)  # (B, heads, N, C / heads)
        out: Tensor = self.to_out[0](attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention: q (B, heads, N, C), k and v (B, heads, M, C) -> (B, heads, N, C)."""
    # the gradients of PyTorch 2.13's fused attention in bfloat16 on a CPU take four times as long as plain products'
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        with torch.autocast("cpu", enabled=False):  # its softmax would be of float32 copies
            return torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class PixelAttention(nn.Module):
    """One-head self-attention over the pixels of a map, with its residual: (B, C, H, W) -> the same.

    The middle of the autoencoder; its linear layers have biases, unlike those of the UNet.
    """

    def __init__(self, channels: int, *, groups: int = 32, eps: float = 1e-6) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1, HW, C)
        mixed = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        out: Tensor = self.to_out[0](mixed[:, 0])
        return x + out.transpose(1, 2).reshape(x.shape)
