"""FID, its limit and KID of one set of features against another, with a warning where FID is uncertain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.metrics.fid import (
    PICTURES_PER_FEATURE,
    FeatureStatistics,
    frechet_at_infinity,
    frechet_interval,
    kernel_distance,
)
from fewstep.metrics.intervals import Estimate, Interval
from fewstep.tables import format_number

WIDE = 0.25
"""An interval of FID that is wider than this share of its value is said to be."""
LARGE = 512
"""Features from here on are resampled less often, since each distance takes seconds."""
SUBSETS, LARGEST_SUBSET = 50, 1000


@dataclass(frozen=True, kw_only=True)
class Distances:
    """FID with its interval and `limit` for infinitely many images (None for too few), and KID; of `count` images."""

    fid: Interval
    limit: float | None
    kid: Estimate
    count: int

    def warning(self) -> str | None:
        """A sentence where the interval of FID is wide, else None."""
        value, low, high = self.fid
        if high - low <= WIDE * value:
            return None
        return (
            f"{self.count} images are few: FID {format_number(value)} is only known to be within "
            f"{format_number(low)} and {format_number(high)}, {format_number(high - low)} wide; take more"
        )


def distances(features: Tensor, reference: Tensor, network: str) -> Distances:
    """The distances of features (N, D) from those (M, D) of real images; the same for the same, to rounding.

    Raises InputError for fewer than 10 images, and NotFiniteError for features that are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    exact = FeatureStatistics.of(reference, network)
    resamples = 200 if features.shape[1] < LARGE else 20
    fid = frechet_interval(features, exact, generator=generator, resamples=resamples)
    enough = len(features) >= PICTURES_PER_FEATURE * features.shape[1]
    subset = min(LARGEST_SUBSET, len(features) // 2, len(reference) // 2)
    return Distances(
        fid=fid,
        limit=frechet_at_infinity(features, exact, generator=generator) if enough else None,
        kid=kernel_distance(features, reference, generator=generator, subsets=SUBSETS, subset_size=subset),
        count=len(features),
    )
