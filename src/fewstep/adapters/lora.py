"""What a LoRA is (arXiv:2106.09685): for each layer, two thin matrices whose product is added to its weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fewstep.weights.model import Loaded, family_of

Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The change of one layer's weight: `alpha / rank` times the product of `up` and `down`.

    `down` (rank, in) and `up` (out, rank); of a convolution (rank, in, k, k) and (out, rank, 1, 1).
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The inner width."""
        return len(self.down)

    def product(self) -> Tensor:
        """The change of the weight, (out, in) or (out, in * k * k), float32."""
        return self.alpha / self.rank * (self.up.float().flatten(1) @ self.down.float().flatten(1))


@dataclass(frozen=True, kw_only=True, eq=False)
class Lora:
    """The changes of a model's layers, by names such as `unet.mid_block.attentions.0.proj_in`.

    The first word is that of `networks`, the rest a diffusers name.
    """

    name: str
    layers: Mapping[str, Factors]


def networks(model: Loaded) -> dict[str, nn.Module]:
    """What a LoRA may change: `unet`, `text_encoder`, `text_encoder_2`; the refiner has the second tower alone."""
    alone = family_of(model.spec.unet) == "sdxl-refiner"
    towers = ("text_encoder_2",) if alone else ("text_encoder", "text_encoder_2")
    encoders = model.networks.text_encoders
    return {"unet": model.networks.unet, **dict(zip(towers[: len(encoders)], encoders, strict=True))}


def layers_of(networks: Mapping[str, nn.Module]) -> dict[str, Layer]:
    """The layers of `networks` that a LoRA may change, each by the name of its network and its own."""
    return {
        f"{prefix}.{name}": layer
        for prefix, network in networks.items()
        for name, layer in network.named_modules()
        if isinstance(layer, Layer)
    }
