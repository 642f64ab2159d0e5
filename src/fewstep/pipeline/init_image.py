"""Where a run starts: from noise, from a picture, or from a picture with a hole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.step import Noise
from fewstep.engines.engine import Engine
from fewstep.errors import InputError
from fewstep.images import mask_to_tensor, picture_size, to_tensor

ImageLike = Any
"""A PIL picture, an array (H, W, 3), a tensor (1, 3, H, W) in [-1, 1], scaled latents (1, 4, h, w), or a path."""


LARGER = 2.0
"""Times the area that a model draws above which a picture is drawn smaller."""


@dataclass(frozen=True, kw_only=True)
class InitImage:
    """The pictures a run starts from, (B or 1, 3, H, W) or latents (B or 1, 4, h, w), and where to paint anew.

    `mask` (1, 1, H, W) is 1 there.
    """

    image: Tensor
    mask: Tensor | None = None

    @property
    def is_latent(self) -> bool:
        """Whether `image` holds latents already."""
        return self.image.shape[1] == 4


def fitted(image: ImageLike | Sequence[ImageLike], native: tuple[int, int], factor: int) -> tuple[int, int] | None:
    """Width and height for a picture that is much larger than the model draws: of its shape, and the model's area.

    None for one of up to twice the native area, for latents, and for what is no picture.
    """
    first = image[0] if isinstance(image, list | tuple) and image else image
    size = None if _latent(first) else picture_size(first)
    if size is None or size[0] * size[1] <= LARGER * native[0] * native[1]:
        return None
    scale = sqrt(native[0] * native[1] / (size[0] * size[1]))
    width, height = (max(64, round(side * scale / factor) * factor) for side in size)
    return width, height


def read_init_image(
    image: ImageLike | Sequence[ImageLike], mask: ImageLike | None, width: int | None, height: int | None
) -> InitImage:
    """The start from one picture, or of one for each prompt; all must come out equally large, in pixels."""
    images = list(image) if isinstance(image, Sequence) and not isinstance(image, str | Path) else [image]
    if not images:
        raise InputError("image is an empty list; give one picture, or one for each prompt")
    tensors = [i if _latent(i) else to_tensor(i, width, height) for i in images]
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(shapes) > 1:
        sizes = ", ".join(sorted(f"{shape[2]}x{shape[1]}" for shape in shapes))
        raise InputError(f"the pictures differ in size ({sizes}); give width and height to resize them")
    pixels = torch.cat(tensors)
    if mask is None:
        return InitImage(image=pixels)
    if _latent(pixels):
        raise InputError("a mask needs a picture to lie on; decode the latents first")
    return InitImage(image=pixels, mask=mask_to_tensor(mask, pixels.shape[3], pixels.shape[2]))


def _latent(image: ImageLike) -> bool:
    return isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == 4


def rows_of(tensor: Tensor, count: int) -> Tensor:
    """`tensor` with its rows repeated to `count`, each in turn."""
    if count % len(tensor):
        raise InputError(f"{len(tensor)} pictures for {count} results; give one picture, or one for each prompt")
    return tensor.repeat_interleave(count // len(tensor), dim=0)


def sample_posterior(engine: Engine, image: Tensor, count: int, noise: Noise) -> Tensor:
    """Latents (count, 4, h, w) drawn from what the encoder makes of `image`."""
    mean, deviation = engine.encode(image)
    return rows_of(mean, count) + rows_of(deviation, count) * noise().to(mean)


def masked_channels(engine: Engine, init: InitImage, count: int, noise: Noise) -> Tensor:
    """What an inpainting UNet reads besides the latents, (count, 5, h, w): mask, and latents of the masked picture."""
    assert init.mask is not None
    latents = sample_posterior(engine, init.image * (init.mask < 0.5), count, noise)
    mask = latent_mask(init.mask, latents)
    return torch.cat([mask.expand(count, -1, -1, -1), latents], dim=1)


def latent_mask(mask: Tensor, latents: Tensor) -> Tensor:
    """`mask` (1, 1, H, W) at the size of `latents`: (1, 1, h, w), 1 where to paint anew."""
    return F.interpolate(mask.to(latents), size=latents.shape[2:])


def masked_denoiser(denoise: Denoiser, known: Tensor, mask: Tensor, noise: Tensor, start: float) -> Denoiser:
    """A denoiser that paints where `mask` is 1 and sees `known` elsewhere, at every level below `start`.

    known, noise (B, 4, h, w), mask (1, 1, h, w). Above, x holds the starting noise everywhere. The latent blending of
    arXiv:2206.02779, sec. 3.3, done on what the network sees: the sampler itself needs no change.
    """

    def keep(x: Tensor, sigma: float) -> Tensor:
        if sigma < start:
            x = torch.lerp(known + sigma * noise, x, mask)
        return torch.lerp(known, denoise(x, sigma), mask)

    return keep
