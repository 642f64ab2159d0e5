"""Aspect-ratio buckets: a few sizes of about one area, so that pictures keep their shape."""

from __future__ import annotations

from functools import cache
from math import log
from typing import NamedTuple

from fewstep.errors import InputError

LEAST_AREA = 0.9
LARGEST_SIDE = 8192  # pixels


class Size(NamedTuple):
    """A picture's measures in pixels."""

    width: int
    height: int


@cache
def bucket_sizes(side: int, step: int = 64) -> tuple[Size, ...]:
    """All sizes whose sides are multiples of `step`, narrow ones first.

    No side is under half or over twice `side`, and the area is 0.9 to 1 times that of a square of `side`. For
    1024 these are the buckets of SDXL (arXiv:2307.01952, app. I). Raises `InputError` if `step` does not divide `side`.
    """
    if step < 8 or step % 8:
        raise InputError(f"the buckets' step is {step}; it must be a multiple of 8, as the autoencoders need")
    if side > LARGEST_SIDE:
        raise InputError(f"side {side} is over {LARGEST_SIDE}, the largest that pictures are cut to")
    if side < step or side % step:
        near = max(step, round(side / step) * step)
        raise InputError(f"side {side} is not a multiple of the step {step}; take {near}, or another step")
    sides = [value for value in range(step, 2 * side + 1, step) if 2 * value >= side]
    area = side * side
    return tuple(Size(w, h) for w in sides for h in sides if LEAST_AREA * area <= w * h <= area)


def nearest_bucket(width: int, height: int, sizes: tuple[Size, ...]) -> int:
    """Where in `sizes` the one is whose aspect ratio is nearest on a logarithmic scale; the first of equals."""
    ratio = log(width / height)
    return min(range(len(sizes)), key=lambda i: (abs(log(sizes[i].width / sizes[i].height) - ratio), i))
