"""Feature networks on decoded pictures, as adversarial diffusion distillation was published (arXiv:2311.17042)."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.blockworld.backbone import CHANNELS, SIDE
from fewstep.blockworld.clip import EMBEDDING
from fewstep.distill.discriminator import DiscriminatorInput
from fewstep.engines.engine import Conditioning
from fewstep.errors import InputError
from fewstep.metrics.clip_score import BlockClip
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.train.plan import CPU, MicroBatch
from fewstep.weights.auxiliary import load_dinov2

OURS = "block-clip"
LARGEST_SIDE = 224
"""Pixels of the pictures that a DINOv2 sees; the published ones were trained at 224 before they were at 518."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of DINOv2's training pictures, from 0 to 1."""
TRANSLATION, CUTOUT = 1 / 8, 1 / 2
"""The largest translation of augmented pictures and the side of their cutout, as shares of the picture's side."""


class PixelNetwork(Protocol):
    """A frozen network for pictures (B, 3, side, side) in [-1, 1]; gradients pass through it to them."""

    side: int
    channels: tuple[int, ...]
    embedding: int

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """Feature maps (B, channels[k], h_k, w_k)."""

    def embedded(self, pictures: Tensor) -> Tensor:
        """Embeddings (B, embedding) of pictures."""


class PixelFeatures:
    """Features of the pictures that a frozen autoencoder decodes from latents.

    Oblong pictures are resized to the network's square. `words`: width of the text states, whose mean is the heads'
    condition. `augment`: translation and cutout (arXiv:2006.10738) before the network, not published for this use.
    """

    def __init__(self, autoencoder: AutoencoderKL, network: PixelNetwork, *, words: int, augment: bool = False) -> None:
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.network, self.augment = network, augment
        self.channels, self.condition, self.embedding = network.channels, words, network.embedding

    def view(self, latents: Tensor) -> Tensor:
        """See `Features`: pictures (B, 3, 8h, 8w), about [-1, 1]. Decoders overflow in float16: they get float32."""
        device = latents.device.type
        safe = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != torch.float16
        with torch.autocast(device, enabled=safe):
            return self.autoencoder.decode(latents / self.autoencoder.config.scaling_factor).float()

    def embedded(self, view: Tensor) -> Tensor:
        """See `Features`; of mean 0 and variance 1 over the embedding, whatever the network."""
        return F.layer_norm(self.network.embedded(self._resized(view)).float(), (self.embedding,))

    def __call__(
        self, view: Tensor, conditioning: Conditioning, micro_batch: MicroBatch, purpose: str
    ) -> DiscriminatorInput:
        pictures = self._resized(view)
        if self.augment:
            pictures = translate_and_cutout(pictures, micro_batch, purpose)
        return DiscriminatorInput(self.network.maps(pictures), conditioning.context.mean(1))

    def _resized(self, pictures: Tensor) -> Tensor:
        side = self.network.side
        if pictures.shape[2:] == (side, side):
            return pictures
        return F.interpolate(pictures.float(), (side, side), mode="bicubic", antialias=True)


def translate_and_cutout(pictures: Tensor, micro_batch: MicroBatch, purpose: str) -> Tensor:
    """Square pictures translated by up to an eighth of their side, then with a square of half their side cut out.

    Grey, 0, is what comes in and what the square is filled with; gradients pass to all else.
    """
    side, micro_batch = pictures.shape[-1], micro_batch.on(CPU)
    reach = int(side * TRANSLATION)
    corners = (micro_batch.rand(f"{purpose} moved", 2) * (2 * reach + 1)).long().tolist()
    wide = F.pad(pictures, [reach] * 4)
    translated = torch.stack([one[:, y : y + side, x : x + side] for one, (y, x) in zip(wide, corners, strict=True)])
    centres = side * micro_batch.rand(f"{purpose} cut", 2)[:, :, None]
    rows, columns = ((torch.arange(side) - centres).abs() < side * CUTOUT / 2).unbind(1)
    mask = ~(rows[:, :, None] & columns[:, None, :])
    return translated * mask[:, None].to(translated.device)


def pixel_network(what: str | Path, device: torch.device) -> PixelNetwork:
    """Our own, for block pictures, by the name "block-clip", or the DINOv2 in a transformers folder.

    Raises InputError for anything else, CheckpointError for a folder that is not a `Dinov2Model`'s.
    """
    if str(what) == OURS:
        return BlockNetwork(device)
    if not Path(what).is_dir():
        raise InputError(f"there are no features {str(what)!r}; give teacher, {OURS} or the folder of a DINOv2")
    return DinoNetwork(Path(what), device)


class BlockNetwork:
    """The image tower of `fewstep.blockworld.clip`: the three maps of its convolutions, and its embedding."""

    side, embedding = SIDE, EMBEDDING
    channels: tuple[int, ...] = CHANNELS[1:]

    def __init__(self, device: torch.device) -> None:
        self.tower = BlockClip().image.to(device)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """See `PixelNetwork`."""
        maps: list[Tensor] = self.tower.trunk(pictures)
        return maps

    def embedded(self, pictures: Tensor) -> Tensor:
        """See `PixelNetwork`."""
        embedded: Tensor = self.tower(pictures)
        return embedded


class DinoNetwork:
    """A DINOv2's patch tokens before its first layer and after each quarter of them, as maps, and its first token.

    Those are the places where StyleGAN-T's discriminator (arXiv:2301.09515) looks, whose design was taken over.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.network = load_dinov2(folder).to(device)
        config = self.network.config
        self.side = min(config.side, LARGEST_SIDE) // config.patch * config.patch
        self.layers = sorted({round(config.layers * quarter / 4) for quarter in range(5)})
        self.channels, self.embedding = (config.width,) * len(self.layers), config.width
        self.mean, self.std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """See `PixelNetwork`."""
        states, side = self.network(self._normed(pictures)), self.side // self.network.config.patch
        return [states[layer][:, 1:].mT.unflatten(2, (side, side)) for layer in self.layers]

    def embedded(self, pictures: Tensor) -> Tensor:
        """See `PixelNetwork`."""
        summed: Tensor = self.network.layernorm(self.network(self._normed(pictures))[-1][:, 0])
        return summed

    def _normed(self, pictures: Tensor) -> Tensor:
        return ((pictures + 1) / 2 - self.mean) / self.std
