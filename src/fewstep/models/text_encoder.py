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
        """ids (B, N) int64 -> TextStates."""
        last, penultimate = self.text_model(ids)
        end = (ids == self.config.eos).int().argmax(dim=1)  # the first end token
        pooled = last[torch.arange(len(ids), device=ids.device), end]
        if self.config.projection:
            pooled = self.text_projection(pooled)
        return TextStates(last, penultimate, pooled)


class TextTransformer(nn.Module):
    """Embeddings, causal transformer layers and the final norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = LayerStack(config)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, N) -> states after the final norm, and states before the last layer; both (B, N, width)."""
        last, penultimate = self.encoder(self.embeddings(ids))
        return self.final_layer_norm(last), penultimate


class TextEmbeddings(nn.Module):
    """A vector for each token plus one for its place."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.window, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, N) -> (B, N, width)."""
        out: Tensor = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        return out


class LayerStack(nn.Module):
    """The transformer layers; returns the states after the last one and before it."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, N, width) -> last and penultimate states, both (B, N, width)."""
        before = x
        for layer in self.layers:
            before, x = x, layer(x)
        return x, before


class TextLayer(nn.Module):
    """Causal self-attention and a two-layer network, each after a norm, each with its residual."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.self_attn = CausalAttention(config.width, config.heads)
        self.layer_norm2 = nn.LayerNorm(config.width)
        self.mlp = TextMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, width) -> (B, N, width)."""
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class CausalAttention(nn.Module):
    """Multi-head attention in which a token sees itself and those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, width) -> (B, N, width)."""
        q, k, v = (p(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class TextMLP(nn.Module):
    """Two linear layers around the tower's activation."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.quick = config.activation == "quick_gelu"
        self.fc1 = nn.Linear(config.width, config.inner)
        self.fc2 = nn.Linear(config.inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, width) -> (B, N, width)."""
        x = self.fc1(x)
        x = x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x)
        out: Tensor = self.fc2(x)
        return out
