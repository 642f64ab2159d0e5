"""How far the features of drawn pictures are from those of real ones: FID, its interval and its limit, and KID.

Features (N, D) are what any network says of N pictures. A distance means something beside others only with the same
network, the same reference and the same N, since the Fréchet distance is biased upwards by about 1/N.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import inf, sqrt
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from fewstep.errors import CheckpointError, InputError, NotFiniteError
from fewstep.files import atomic_write
from fewstep.formats.tensors import kind_of, read_safetensors
from fewstep.metrics.intervals import Estimate, Interval

FEWEST_PICTURES = 10
"""Resampling fewer says nothing of how they scatter."""
PICTURES_PER_FEATURE = 4
"""From here on the bias is nearly linear in 1/N down to half of the pictures."""


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """Mean (D,) and scatter (D, D), the summed outer products of deviations, of `count` features; float64.

    `network` names what made the features: statistics of different networks are never mixed.
    """

    network: str
    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor, network: str = "unnamed") -> FeatureStatistics:
        """The statistics of features (N, D), on their device.

        Raises InputError for another shape or no pictures, NotFiniteError for NaN or infinity.
        """
        rows = _rows(features)
        mean = rows.mean(0)
        centred = rows - mean
        return cls(network=network, count=len(rows), mean=mean, scatter=centred.T @ centred)

    @classmethod
    def of_batches(cls, batches: Iterable[Tensor], network: str = "unnamed") -> FeatureStatistics:
        """The statistics of all batches (N, D), of which one is held at a time."""
        total: FeatureStatistics | None = None
        for features in batches:
            part = cls.of(features, network)
            total = part if total is None else total.merged(part)
        if total is None:
            raise InputError("there are no features; give at least one batch")
        return total

    def merged(self, other: FeatureStatistics) -> FeatureStatistics:
        """The statistics of both sets together (Chan, Golub and LeVeque 1979); InputError for unlike features."""
        _check_alike(self, other)
        count = self.count + other.count
        gap = other.mean - self.mean
        between = torch.outer(gap, gap) * (self.count * other.count / count)
        return FeatureStatistics(
            network=self.network,
            count=count,
            mean=self.mean + gap * (other.count / count),
            scatter=self.scatter + other.scatter + between,
        )

    @cached_property
    def covariance(self) -> Tensor:
        """(D, D), unbiased; InputError for fewer than two pictures."""
        if self.count < 2:
            raise InputError(f"{self.count} picture has no spread: any distance is possible; take more")
        return self.scatter / (self.count - 1)

    @cached_property
    def root(self) -> Tensor:
        """(D, R) with `root @ root.T` the covariance, R its rank: no column is rounding noise."""
        values, vectors = torch.linalg.eigh(self.covariance)
        noise = values[-1] * len(values) * torch.finfo(values.dtype).eps
        kept = values > noise
        root: Tensor = vectors[:, kept] * values[kept].sqrt()
        return root

    def save(self, path: Path) -> None:
        """Write a .safetensors file, which appears whole or not at all."""
        tensors = {"mean": self.mean.cpu().contiguous(), "scatter": self.scatter.cpu().contiguous()}
        with atomic_write(path) as file:
            file.write(save(tensors, {"network": self.network, "count": str(self.count)}))

    @classmethod
    def load(cls, path: Path) -> FeatureStatistics:
        """The statistics that `save` wrote, on the CPU; CheckpointError for any other file."""
        foreign = f"{path} holds no feature statistics; write it with FeatureStatistics.save"
        if kind_of(path) != "safetensors":
            raise CheckpointError(foreign)
        file = read_safetensors(path)
        width, count = file.shapes.get("mean", ()), file.notes.get("count", "")
        if not (len(width) == 1 and file.shapes.get("scatter") == width * 2 and count.isdecimal() and int(count) > 0):
            raise CheckpointError(foreign)
        mean, scatter = (file.read(name, False).double() for name in ("mean", "scatter"))
        return cls(network=file.notes.get("network", "unnamed"), count=int(count), mean=mean, scatter=scatter)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The Fréchet distance of the two normal distributions, squared as in FID (arXiv:1706.08500).

    `|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))`. The last trace is the sum of the singular values of
    `root_a^T root_b`, the square roots of the eigenvalues of the symmetric product `root_a^T B root_a`: no complex
    numbers, and no noise from covariances without full rank. Raises InputError for unlike features, or fewer than
    two pictures.
    """
    _check_alike(a, b)
    shift = (a.mean - b.mean).square().sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * torch.linalg.svdvals(a.root.T @ b.root).sum()
    return max(0.0, float(shift + spread))


def frechet_interval(
    features: Tensor,
    reference: FeatureStatistics,
    *,
    generator: torch.Generator,
    resamples: int = 200,
    widest: float = inf,
) -> Interval:
    """The FID of features (N, D), and where it would be with endless pictures, at 95 %.

    The ends are from the basic bootstrap, which mirrors the resampled distances about the value and so takes the
    bias off; the value is always within. With no more pictures than features nothing bounds the distance below, and
    `low` is 0. The reference counts as exact: make it of many more pictures. Time: `resamples` times that of
    `frechet_distance`.

    Raises InputError for fewer than 10 pictures, and for an interval wider than `widest`, which it then tells.
    """
    rows = _rows(features)
    if len(rows) < FEWEST_PICTURES:
        raise InputError(f"{len(rows)} pictures: any distance is possible; take at least {FEWEST_PICTURES}")
    value = _distance(rows, reference)
    picks = (torch.randint(len(rows), (len(rows),), generator=generator).to(rows.device) for _ in range(resamples))
    again = torch.tensor([_distance(rows[pick], reference) for pick in picks], dtype=torch.float64)
    low, high = (2 * value - again.quantile(share).item() for share in (0.975, 0.025))
    bounded = len(rows) > rows.shape[1]
    interval = Interval(value, max(0.0, min(low, value)) if bounded else 0.0, max(high, value))
    _check_width(interval, len(rows), widest)
    return interval


def frechet_at_infinity(
    features: Tensor, reference: FeatureStatistics, *, generator: torch.Generator, points: int = 15
) -> float:
    """The FID of endless pictures: the line through those of N/2 to N pictures, at 1/N = 0 (arXiv:1911.07023).

    It may come out slightly negative. Raises InputError for fewer than 4 pictures a feature, where no line fits.
    """
    rows = _rows(features)
    fewest = PICTURES_PER_FEATURE * rows.shape[1]
    if len(rows) < fewest:
        raise InputError(
            f"{len(rows)} pictures for {rows.shape[1]} features are too few to extrapolate from; take at least "
            f"{fewest}, or report frechet_interval"
        )
    sizes = torch.linspace(len(rows) / 2, len(rows), points, dtype=torch.float64).long()
    parts = (torch.randperm(len(rows), generator=generator)[:size].to(rows.device) for size in sizes.tolist())
    distances = torch.tensor([_distance(rows[part], reference) for part in parts], dtype=torch.float64)
    line = torch.stack([torch.ones_like(distances), 1 / sizes], 1)
    return float(torch.linalg.lstsq(line, distances[:, None]).solution[0])


def kernel_distance(
    features_a: Tensor, features_b: Tensor, *, generator: torch.Generator, subsets: int = 100, subset_size: int = 1000
) -> Estimate:
    """KID: the squared maximum mean discrepancy under the kernel `(x . y / D + 1)^3` (arXiv:1801.01401).

    The mean of unbiased estimates, which may be negative, from random subsets of features (N, D) and (M, D). Subsets
    of one set overlap, so the standard error is theirs scaled as subsampling demands, by
    `sqrt(subset_size / (min(N, M) - subset_size))`, which is the usual one over `sqrt(subsets)` where they share
    out all pictures; where both sets are alike, it is too large.

    Raises InputError for unlike widths, fewer than 2 subsets, or subsets of under 2 or over half of the pictures.
    """
    a, b = _rows(features_a), _rows(features_b)
    if a.shape[1] != b.shape[1]:
        raise InputError(f"features of {a.shape[1]} and {b.shape[1]} numbers cannot be compared; use one network")
    fewest = min(len(a), len(b))
    if subsets < 2 or not 2 <= subset_size <= fewest // 2:
        raise InputError(
            f"{subsets} subsets of {subset_size} from {fewest} pictures tell no error; take at least 2 subsets of 2 to "
            f"{fewest // 2}, or more pictures"
        )
    values = torch.stack(
        [_discrepancy(_drawn(a, subset_size, generator), _drawn(b, subset_size, generator)) for _ in range(subsets)]
    )
    scale = sqrt(subset_size / (fewest - subset_size))
    return Estimate(float(values.mean()), float(values.std()) * scale)


def _drawn(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]


def _discrepancy(a: Tensor, b: Tensor) -> Tensor:
    """The unbiased squared discrepancy of (n, D) and (n, D): no picture is compared with itself."""
    n, width = a.shape
    within_a, within_b, between = ((x @ y.T / width + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = within_a.sum() - within_a.trace() + within_b.sum() - within_b.trace()
    return within / (n * (n - 1)) - 2 * between.mean()


def _distance(rows: Tensor, reference: FeatureStatistics) -> float:
    return frechet_distance(FeatureStatistics.of(rows, reference.network), reference)


def _rows(features: Tensor) -> Tensor:
    """Features (N, D) in float64, checked."""
    if features.ndim != 2 or 0 in features.shape:
        raise InputError(
            f"features have shape {tuple(features.shape)}; they are (pictures, numbers), neither of them 0"
        )
    rows = features.detach().double()
    bad = (~rows.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise NotFiniteError(f"features of {len(bad)} of {len(rows)} pictures are not finite, first of number {bad[0]}")
    return rows


def _check_alike(a: FeatureStatistics, b: FeatureStatistics) -> None:
    if a.network != b.network or a.mean.shape != b.mean.shape:
        raise InputError(
            f"features of {a.network!r} ({len(a.mean)} numbers) and {b.network!r} ({len(b.mean)}) cannot be compared; "
            "use one network for both"
        )


def _check_width(interval: Interval, count: int, widest: float) -> None:
    value, low, high = interval
    if high - low > widest:
        raise InputError(
            f"the distance {value:.4g} of {count} pictures is only known to be within {low:.4g} and {high:.4g}, which "
            f"is wider than {widest:g}; take more pictures"
        )
