"""Nearest training images of generated ones: whether a model copies its training data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.errors import InputError
from fewstep.metrics.intervals import Interval, share_interval
from fewstep.metrics.pixels import Images, resized_tensor

SIDE = 32
"""At which pixels are compared."""
COPY = 4.0
"""Root mean square difference, of 255, up to which two images are one."""
CANDIDATES = 8
"""Nearest by features whose pixels are compared."""


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """For each of N images: its nearest training image, how far its features and how far its pixels are.

    `index` (N,); `distance` (N,) of the features; `pixels` (N,), the root mean square difference of 255.
    """

    index: Tensor
    distance: Tensor
    pixels: Tensor

    @property
    def copies(self) -> Interval:
        """The share of images that are a training image, with its 95 % interval."""
        return share_interval(float((self.pixels <= COPY).double().mean()), len(self.pixels))

    def relative_distance(self, real: Neighbours) -> float:
        """The median distance as a share of that of fresh real images: well under 1 is a sign of memorization."""
        real_median = float(real.distance.median())
        return float(self.distance.median()) / real_median if real_median else float("inf")


def nearest(images: Images, features: Tensor, training: Images, training_features: Tensor) -> Neighbours:
    """The neighbours of images with features (N, D) among `training` with features (M, D).

    Of the 8 that features find nearest the one with the nearest pixels counts.
    """
    if not (len(training) and len(images)):
        raise InputError(f"{len(images)} images and {len(training)} to compare with; give at least one of each")
    gaps = torch.cdist(features.double(), training_features.double())
    near = gaps.topk(min(CANDIDATES, len(training)), dim=1, largest=False).indices
    small = torch.cat([resized_tensor(training[i], SIDE) for i in sorted(set(near.flatten().tolist()))])
    place = {index: row for row, index in enumerate(sorted(set(near.flatten().tolist())))}
    rows = torch.tensor([[place[i] for i in own] for own in near.tolist()])
    generated = torch.cat([resized_tensor(image, SIDE) for image in images])
    differences = F.mse_loss(small[rows], generated[:, None].expand(-1, rows.shape[1], -1, -1, -1), reduction="none")
    pixels, which = differences.mean((2, 3, 4)).sqrt().min(1)
    return Neighbours(index=near.gather(1, which[:, None])[:, 0], distance=gaps.amin(1), pixels=pixels)
