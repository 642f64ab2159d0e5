"""Diversity of the images of one prompt: a collapsed model may follow every prompt, each with one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log2, sqrt

import torch
from PIL import Image
from torch import Tensor

from fewstep.errors import InputError
from fewstep.metrics.intervals import Estimate, Interval
from fewstep.metrics.pixels import Images, image_tensor

SEEDS = 16
BINS = 16
"""Of places and of sizes, over all that an image can hold."""
COLOURED = 40
"""By how much, of 255, the highest and the lowest channel differ where there is an object and no stage."""


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """How much the images of each of P prompts differ; all (P,) float64.

    `variance`: of the features, summed over them. `places` and `sizes`: the entropy in bits of where the coloured
    part of an image has its middle (the mean over both axes), and of how much of the image it is. A model that gives
    wrong images has more of all three: read them beside its accuracy.
    """

    variance: Tensor
    places: Tensor
    sizes: Tensor

    def averages(self) -> dict[str, float]:
        """Each measure's mean over the prompts."""
        return {name: float(values.mean()) for name, values in vars(self).items()}

    def relative_to(self, base: Diversity) -> dict[str, Interval]:
        """Each mean as a share of another model's on the same prompts, with its 95 % interval.

        That of a ratio of means; of one prompt it is infinite, and so is a share of 0.
        """
        return {name: _ratio(values, getattr(base, name)) for name, values in vars(self).items()}


def diversity(images: Sequence[Images], features: Sequence[Tensor]) -> Diversity:
    """The diversity of images by prompt, with the features (N, D) of each; InputError for prompts of one image.

    Entropies of few images are too low: compare equal numbers.
    """
    if not images or min(map(len, images)) < 2:
        raise InputError("one image of a prompt differs from nothing; draw at least 2 for each prompt")
    middles = [torch.stack([blob(image) for image in own]) for own in images]
    return Diversity(
        variance=torch.stack([rows.double().var(0).sum() for rows in features]),
        places=_values([(entropy(rows[:, 0]) + entropy(rows[:, 1])) / 2 for rows in middles]),
        sizes=_values([entropy(rows[:, 2]) for rows in middles]),
    )


def blob(image: Image.Image) -> Tensor:
    """(3,): row and column of the middle of what is coloured, and the root of its area, all as shares of the side."""
    values = image_tensor(image)[0]
    mask = (values.amax(0) - values.amin(0) > COLOURED).float()
    area, (height, width) = mask.sum(), mask.shape
    if area == 0:
        return torch.tensor([0.5, 0.5, 0.0])
    row = (mask.sum(1) * (torch.arange(height) + 0.5)).sum() / area / height
    column = (mask.sum(0) * (torch.arange(width) + 0.5)).sum() / area / width
    return torch.stack([row, column, (area / (height * width)).sqrt()])


def entropy(shares: Tensor) -> float:
    """Bits of the histogram of values (N,) in [0, 1]; 0 for equal ones."""
    counts = torch.bincount((shares * BINS).long().clamp(0, BINS - 1), minlength=BINS)
    portions = [count / len(shares) for count in counts.tolist() if count]
    bits: float = sum(-portion * log2(portion) for portion in portions)
    return bits


def _ratio(values: Tensor, base: Tensor) -> Interval:
    if not base.any():
        return Interval(inf, 0.0, inf)
    share = float(values.mean() / base.mean())
    error = float((values - share * base).std() / base.mean()) / sqrt(len(base)) if len(base) > 1 else inf
    return Estimate(share, error).interval


def _values(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
