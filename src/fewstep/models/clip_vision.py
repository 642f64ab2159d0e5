"""CLIP's image tower (arXiv:2103.00020): a vision transformer that maps images to embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import CheckpointError, quoted
from fewstep.models.config import TextConfig
from fewstep.models.text_encoder import TextLayer


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The shape of an image tower: `layer` as of a text tower's layers, `side` and `patch` in pixels."""

    layer: TextConfig
    side: int = 224
    patch: int = 32
    projection: int = 512

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> VisionConfig:
        """From the config.json of a `CLIPModel`; CheckpointError for an activation or epsilon unlike CLIP's."""
        own = config["vision_config"]
        if (activation := own.get("hidden_act", "quick_gelu")) not in ("quick_gelu", "gelu"):
            raise CheckpointError(f"image tower: hidden_act is {activation!r}; known are 'quick_gelu' and 'gelu'")
        if (eps := own.get("layer_norm_eps", 1e-5)) != 1e-5:
            raise CheckpointError(f"image tower: layer_norm_eps is {quoted(eps)}; CLIP's is 1e-05")
        layer = TextConfig(
            width=own.get("hidden_size", 768),
            layers=own.get("num_hidden_layers", 12),
            heads=own.get("num_attention_heads", 12),
            inner=own.get("intermediate_size", 3072),
            activation=activation,
        )
        side, patch = own.get("image_size", 224), own.get("patch_size", 32)
        return cls(layer=layer, side=side, patch=patch, projection=config.get("projection_dim", 512))


class VisionTower(nn.Module):
    """Normed images (B, 3, side, side) -> embeddings (B, projection).

    Parameter names are those of a transformers `CLIPModel`; the misspelt one is theirs.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.layer.width
        self.vision_model = nn.ModuleDict(
            {
                "embeddings": PatchEmbedding(config),
                "pre_layrnorm": nn.LayerNorm(width),
                "encoder": nn.ModuleDict(
                    {"layers": nn.ModuleList(TextLayer(config.layer, causal=False) for _ in range(config.layer.layers))}
                ),
                "post_layernorm": nn.LayerNorm(width),
            }
        )
        self.visual_projection = nn.Linear(width, config.projection, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        embeddings, before, encoder, after = self.vision_model.values()
        assert isinstance(encoder, nn.ModuleDict)
        x = before(embeddings(images))
        for layer in encoder["layers"].children():
            x = layer(x)
        embedded: Tensor = self.visual_projection(after(x[:, 0]))
        return embedded


class PatchEmbedding(nn.Module):
    """Images (B, 3, side, side) -> tokens (B, 1 + patches, width), the first of which is the class token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, count = config.layer.width, (config.side // config.patch) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False)
        self.position_embedding = nn.Embedding(count + 1, width)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight
