"""What an engine is: four functions of tensors, behind which a pipeline does not look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Embedding = tuple[Tensor, Tensor | None]
"""Of texts: context (B, M, D), and pooled (B, P) where the UNet reads it."""


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the UNet is told besides the noisy latents; one row a picture.

    `context` (B, M, D) text states. Of SDXL alone: `pooled` (B, P) and `sizes` (B, 6 or 5). Of inpainting UNets alone:
    `channels` (B, 5, h, w), the mask and the masked latents, appended to the latents.
    """

    context: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None
    channels: Tensor | None = None


def stacked(first: Conditioning, second: Conditioning) -> Conditioning:
    """The rows of both, those of `first` first."""

    def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.cat([a, b])

    return Conditioning(
        context=torch.cat([first.context, second.context]),
        pooled=both(first.pooled, second.pooled),
        sizes=both(first.sizes, second.sizes),
        channels=both(first.channels, second.channels),
    )


class Engine(Protocol):
    """Runs the parts of one model. Tensors come back on the CPU or on `device`, always in float32."""

    @property
    def device(self) -> torch.device:
        """Where the latents live while the engine walks them."""

    def encode_text(self, ids: Sequence[Tensor]) -> Embedding:
        """Ids (B, chunks, window) of each text tower -> context (B, chunks * window, D), pooled (B, P) or None."""

    def predict(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """Latents (B, 4, h, w) of unit variance at time step `t` -> the UNet's output (B, 4, h, w)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> image (B, 3, 8h, 8w), about [-1, 1]."""

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, 3, H, W) in [-1, 1] -> mean and standard deviation of its scaled latents, (B, 4, H/8, W/8)."""
