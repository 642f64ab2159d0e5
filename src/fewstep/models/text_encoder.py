"""The text tower of CLIP (arXiv:2103.00020), as SD 1, SD 2 and SDXL use it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.models.config import TextConfig


class TextStates(NamedTuple):
    """What a text tower makes of its tokens.

    `last` (B, N, width) after the final norm, read by SD 1 and 2; `penultimate` (B, N, width) before the last layer,
    read by SDXL; `pooled` (B, projection), or (B, width) without a projection.
    """

    last: Tensor
    penultimate: Tensor
    pooled: Tensor


class TextEncoder(nn.Module):
    """Token ids (B, N) int64, N at most `config.window` -> TextStates.

    Parameter names are those of a transformers `CLIPTextModel(WithProjection)` with the prefix `text_model.`.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)
        if config.projection:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, ids: Tensor) -> TextStates:
        last, penultimate = self.text_model(ids)
        end = (ids == self.config.eos).int().argmax(dim=1)  # the first end token
        pooled = last[torch.arange(len(ids), device=ids.device), end]
        if self.config.projection:
            pooled = self.text_projection(pooled)
        return TextStates(last, penultimate, pooled)


class TextTransformer(nn.Module):
    """Ids (B, N) -> states after the final norm, and states before the last layer; both (B, N, width).

    The dictionaries give the parameters their published names.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        tokens = nn.Embedding(config.vocabulary, config.width)
        positions = nn.Embedding(config.window, config.width)
        self.embeddings = nn.ModuleDict({"token_embedding": tokens, "position_embedding": positions})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(TextLayer(config) for _ in range(config.layers))})
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = before = self.embeddings["token_embedding"](ids) + self.embeddings["position_embedding"](places)
        for layer in self.encoder["layers"].children():
            before, x = x, layer(x)
        return self.final_layer_norm(x), before


class TextLayer(nn.Module):
    """Self-attention and a two-layer network, each after a norm and with its residual: x (B, N, width)."""

    def __init__(self, config: TextConfig, *, causal: bool = True) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.self_attn = SelfAttention(config.width, config.heads, causal=causal)
        self.layer_norm2 = nn.LayerNorm(config.width)
        self.mlp = TextMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class SelfAttention(nn.Module):
    """Multi-head attention, `causal` where a token sees but itself and those before it: x (B, N, width)."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class TextMLP(nn.Module):
    """Two linear layers around the tower's activation: x (B, N, width)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.quick = config.activation == "quick_gelu"
        self.fc1 = nn.Linear(config.width, config.inner)
        self.fc2 = nn.Linear(config.inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x)
        out: Tensor = self.fc2(x)
        return out
