"""DINOv2 (arXiv:2304.07193): a vision transformer; adversarial distillation uses its features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Dinov2Config:
    """The shape of a DINOv2; `side` and `patch` in pixels, `gated` as its largest one is. Defaults are its base."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    ratio: float = 4.0
    gated: bool = False
    eps: float = 1e-6
    side: int = 518
    patch: int = 14

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> Dinov2Config:
        """From the config.json of a `Dinov2Model`; CheckpointError for another model, or one that cannot be built."""
        if (kind := config.get("model_type")) != "dinov2":
            raise CheckpointError(f"model_type is {kind!r}; expected 'dinov2', without registers")
        if (activation := config.get("hidden_act", "gelu")) != "gelu":
            raise CheckpointError(f"hidden_act is {activation!r}; DINOv2 has 'gelu'")
        shape = cls(
            width=int(config.get("hidden_size", cls.width)),
            layers=int(config.get("num_hidden_layers", cls.layers)),
            heads=int(config.get("num_attention_heads", cls.heads)),
            ratio=float(config.get("mlp_ratio", cls.ratio)),
            gated=bool(config.get("use_swiglu_ffn", cls.gated)),
            eps=float(config.get("layer_norm_eps", cls.eps)),
            side=int(config.get("image_size", cls.side)),
            patch=int(config.get("patch_size", cls.patch)),
        )
        if min(shape.width, shape.layers, shape.heads, shape.patch) < 1 or shape.width % shape.heads:
            raise CheckpointError(f"{shape} cannot be built: numbers are at least 1, and heads divide the width")
        return shape


class Dinov2(nn.Module):
    """Normed images (B, 3, H, W) -> the tokens (B, 1 + N, width) before the first layer and after each one.

    The first is the class token, the others are the N whole patches, row by row. Parameter names are those of a
    transformers `Dinov2Model`. `layernorm` is for the last tokens.
    """

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config) for _ in range(config.layers))})
        self.layernorm = nn.LayerNorm(config.width, config.eps)

    def forward(self, images: Tensor) -> list[Tensor]:
        states = [self.embeddings(images)]
        for layer in self.encoder["layer"].children():
            states.append(layer(states[-1]))
        return states


class Embeddings(nn.Module):
    """Images (B, 3, H, W) -> tokens (B, 1 + N, width); positions are interpolated where N is not the trained one."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        width, count = config.width, (config.side // config.patch) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # of its training alone
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + count, width))
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(3, width, config.patch, stride=config.patch)})

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embeddings["projection"](images)
        positions = self.positions(*patches.shape[2:])
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches.flatten(2).mT], dim=1)
        return tokens + positions

    def positions(self, rows: int, columns: int) -> Tensor:
        """(1, 1 + rows * columns, width)."""
        first, rest = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        side = isqrt(rest.shape[1])
        if (rows, columns) != (side, side):
            grid = rest.mT.reshape(1, -1, side, side)
            rest = F.interpolate(grid, (rows, columns), mode="bicubic").flatten(2).mT
        return torch.cat([first, rest], dim=1)


class Layer(nn.Module):
    """Self-attention and a two-layer network, each normed before, scaled after and added: x (B, N, width)."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        inner = int(config.width * config.ratio)
        self.norm1, self.norm2 = (nn.LayerNorm(config.width, config.eps) for _ in range(2))
        self.attention = Dinov2SelfAttention(config.width, config.heads)
        self.mlp = GatedMLP(config.width, inner) if config.gated else MLP(config.width, inner)
        self.layer_scale1, self.layer_scale2 = Scale(config.width), Scale(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        out: Tensor = x + self.layer_scale2(self.mlp(self.norm2(x)))
        return out


class Dinov2SelfAttention(nn.Module):
    """Multi-head attention of all tokens to all: x (B, N, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width)})

    def forward(self, x: Tensor) -> Tensor:
        projected = (self.attention[name](x) for name in ("query", "key", "value"))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in projected)
        out: Tensor = self.output["dense"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Scale(nn.Module):
    """A learned factor for each channel: x (B, N, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class MLP(nn.Module):
    """Two linear layers around GELU: x (B, N, width)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class GatedMLP(nn.Module):
    """Two linear layers around SwiGLU (arXiv:2002.05202), two thirds as wide, rounded up to 8: x (B, N, width)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        inner = (int(inner * 2 / 3) + 7) // 8 * 8
        self.weights_in, self.weights_out = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.weights_in(x).chunk(2, dim=-1)
        out: Tensor = self.weights_out(F.silu(gate) * value)
        return out
