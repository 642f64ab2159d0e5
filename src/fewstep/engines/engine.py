"""The engine protocol: four functions of tensors, behind which a pipeline does not look."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Embedding = tuple[Tensor, Tensor | None]
"""Of texts: context (B, M, D), and pooled (B, P) where the UNet reads it."""


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What conditions the UNet besides the noisy latents; one row a picture.

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

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Latents (B, 4, h, w) of unit variance at time steps t (B,), one a row -> the UNet's output (B, 4, h, w)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> image (B, 3, 8h, 8w), about [-1, 1]."""

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, 3, H, W) in [-1, 1] -> mean and standard deviation of its scaled latents, (B, 4, H/8, W/8)."""


Function = Callable[..., Sequence[Tensor]]
"""Of tensors, or None in the place of one; what it makes of them depends on nothing else."""


class NotRecordable(Exception):
    """A function needs something from the host while it runs."""


@runtime_checkable
class Recorder(Engine, Protocol):
    """An engine that can record a function which calls it, and replay that at the cost of one launch."""

    def record(
        self, key: Hashable, function: Function, given: Sequence[Tensor | None]
    ) -> Callable[[], Sequence[Tensor]] | None:
        """Launch what was recorded of `function`; the function that waits for its outputs, copies on the CPU.

        `key` stands for all that `function` depends on besides `given`. Inside it, the engine's own functions neither
        wait for the device nor look for changed weights. None for what is not recorded: a key that is new (it is
        recorded when it comes again), a function that raises NotRecordable, and what has no room.
        """
