"""FID against CLIP score over guidance scales: the Pareto front and its knee.

As the card of Stable Diffusion v1-4 shows it: guidance 1.5 to 8.0, 50 PLMS steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fewstep.errors import InputError
from fewstep.metrics.distances import Distances
from fewstep.metrics.intervals import Estimate
from fewstep.tables import Cell

SCALES = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
STEPS, SAMPLER = 50, "plms"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One guidance scale: the mean CLIP score, and the distances from real images; `black` of its images are black."""

    scale: float
    clip: Estimate
    distances: Distances
    black: int = 0

    @property
    def fid(self) -> float:
        """FID."""
        return self.distances.fid.value

    def row(self, model: str) -> dict[str, Cell]:
        """The point's table row."""
        clip, distances = self.clip.interval, self.distances
        return {
            "model": model,
            "guidance": self.scale,
            "CLIP score": clip.value,
            "clip_low": clip.low,
            "clip_high": clip.high,
            "FID": distances.fid.value,
            "fid_low": distances.fid.low,
            "fid_high": distances.fid.high,
            "KID": distances.kid.value,
            "kid_error": distances.kid.standard_error,
            "pictures": distances.count,
            "black": self.black,
        }

    def warnings(self) -> list[str]:
        """Sentences on a wide interval of FID and on black images."""
        black = f"{self.black} of {self.distances.count} images are black or were not finite" if self.black else None
        return [f"guidance {self.scale:g}: {text}" for text in (self.distances.warning(), black) if text]


def front(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points that no other one beats in both FID and CLIP score, by rising CLIP score."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.clip.value, p.fid)):
        if not best or point.fid < best[-1].fid:
            best.append(point)
    return tuple(reversed(best))


def knee(points: Sequence[Point]) -> Point:
    """The point of the front nearest to the best of both, each axis scaled to the range of all points.

    InputError for no points.
    """
    if not points:
        raise InputError("there are no points; measure at least one guidance scale")
    gap_clip, gap_fid = _gaps([-p.clip.value for p in points]), _gaps([p.fid for p in points])
    return min(front(points), key=lambda p: gap_clip(-p.clip.value) ** 2 + gap_fid(p.fid) ** 2)


def _gaps(values: Sequence[float]) -> Callable[[float], float]:
    """How far a value is from the least of `values`, as a share of their range."""
    least, width = min(values), max(values) - min(values) or 1.0
    return lambda value: (value - least) / width
