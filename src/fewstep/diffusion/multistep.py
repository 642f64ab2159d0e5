"""Samplers that reuse the predictions of earlier steps, at one evaluation a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import exp, expm1, sqrt
from typing import NamedTuple

from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.step import Noise, Step, log_step

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the latest slopes, newest first, by how many there are."""


class History(NamedTuple):
    """A step already taken: the prediction at its start, and its length `h`."""

    x0: Tensor
    h: float


def plms(denoise: Denoiser, x: Tensor, sigmas: Sequence[float]) -> Iterator[Step]:
    """Pseudo linear multistep (arXiv:2202.09778, eq. 12) up to order 4, its first step by Heun's method.

    One evaluation a step, and one more for the first unless it is the only one.
    """
    slopes: list[Tensor] = []
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        slopes = [(x - x0) / sigma, *slopes[:3]]
        slope = _mean_slope(slopes)
        if len(slopes) == 1 and len(sigmas) > 2:
            ahead = x + slope * (sigma_next - sigma)
            slope = (slope + (ahead - denoise(ahead, sigma_next)) / sigma_next) / 2
        x = x + slope * (sigma_next - sigma)
        yield Step(x, x0, sigma_next)


def _mean_slope(slopes: Sequence[Tensor]) -> Tensor:
    """The mean slope of the coming step, extrapolated from up to four, newest first."""
    first, *rest = (w * slope for w, slope in zip(ADAMS_BASHFORTH[len(slopes) - 1], slopes, strict=True))
    return sum(rest, start=first)


def dpmpp_2m(denoise: Denoiser, x: Tensor, sigmas: Sequence[float]) -> Iterator[Step]:
    """DPM-Solver++(2M), midpoint form (arXiv:2211.01095, Alg. 2)."""
    past: list[History] = []
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        h = log_step(sigma, sigma_next)
        target = x0 if _ends_first_order(sigmas, sigma_next) else _midpoint(x0, h, past)
        x = target + (x - target) * (sigma_next / sigma)
        past = [History(x0, h)]
        yield Step(x, x0, sigma_next)


def dpmpp_2m_sde(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], *, noise: Noise, eta: float = 1.0
) -> Iterator[Step]:
    """DPM-Solver++(2M) with `eta`, 0 ... 1, of the SDE's noise: `dpmpp_2m` at 0."""
    past: list[History] = []
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        h = log_step(sigma, sigma_next)
        target = x0 if _ends_first_order(sigmas, sigma_next) else _midpoint(x0, h, past)
        x = target + (x - target) * exp(-h - eta * h)
        if eta * sigma_next > 0:
            x = x + _sde_noise(sigma_next, eta * h) * noise()
        past = [History(x0, h)]
        yield Step(x, x0, sigma_next)


def _midpoint(x0: Tensor, h: float, past: Sequence[History]) -> Tensor:
    """The prediction in the middle of the coming step, on the line through the last two."""
    if not past:
        return x0
    return x0 + (x0 - past[0].x0) * (h / (2 * past[0].h))


def _ends_first_order(sigmas: Sequence[float], sigma_next: float) -> bool:
    """Whether this is a last step to take without extrapolation: to 0, or of a short run."""
    return sigma_next == sigmas[-1] and (sigma_next == 0 or len(sigmas) <= 15)


def _sde_noise(sigma_next: float, h: float) -> float:
    """The std of the noise that the SDE adds over a step of length `h`."""
    return sigma_next * sqrt(-expm1(-2 * h))


def dpmpp_3m_sde(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], *, noise: Noise, eta: float = 1.0
) -> Iterator[Step]:
    """DPM-Solver++(3M) with `eta`, 0 ... 1, of the SDE's noise: k-diffusion's `sample_dpmpp_3m_sde`.

    The published weights give the second difference half its coefficient: order 2, not 3.
    """
    past: list[History] = []
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        h = log_step(sigma, sigma_next)
        x = x0 + (x - x0) * exp(-h - eta * h)
        if past and sigma_next > 0:
            x = x + _drift(x0, h, past, eta)
        if eta * sigma_next > 0:
            x = x + _sde_noise(sigma_next, eta * h) * noise()
        past = [History(x0, h), *past[:1]]
        yield Step(x, x0, sigma_next)


def _drift(x0: Tensor, h: float, past: Sequence[History], eta: float) -> Tensor:
    """What a prediction that changes, along the line or parabola through the last ones, adds to a step."""
    length = h + eta * h
    phi2 = expm1(-length) / length + 1
    phi3 = phi2 / length - 1 / 2
    slope = (x0 - past[0].x0) * (h / past[0].h)
    if len(past) == 1:
        return phi2 * slope
    slope_before = (past[0].x0 - past[1].x0) * (h / past[1].h)
    second_difference = (slope - slope_before) * (h / (past[0].h + past[1].h))
    return phi2 * (slope + second_difference * (past[0].h / h)) - phi3 * second_difference


def unipc(denoise: Denoiser, x: Tensor, sigmas: Sequence[float]) -> Iterator[Step]:
    """UniPC-2 with B2(h) (arXiv:2302.04867): `dpmpp_2m`, each step redone with its end known.

    Redoing costs no evaluation: the one at the predicted `x` serves it and the next step.
    """
    past: list[History] = []
    start = x
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        if past:
            x = _corrected(start, x0, past)
        h = log_step(sigma, sigma_next)
        target = x0 if sigma_next == sigmas[-1] else _midpoint(x0, h, past)
        start, x = x, target + (x - target) * (sigma_next / sigma)
        past = [History(x0, h), *past[:1]]
        yield Step(x, x0, sigma_next)


def _corrected(start: Tensor, x0_end: Tensor, past: Sequence[History]) -> Tensor:
    """The last step redone from `start`, by the line or parabola through the predictions up to its end.

    With u = 0 ... 1 along the step, what counts of a prediction u and u^2 are their means under the
    exponential weight of the step's exact solution.
    """
    x0, h = past[0]
    if len(past) == 1:
        target = x0 + (x0_end - x0) / 2
    else:
        mean_u = -1 / expm1(-h) - 1 / h
        mean_u2 = -1 / expm1(-h) - 2 * mean_u / h
        u = -past[1].h / h  # where the step before began
        before = (mean_u - mean_u2) / (1 - u)
        target = x0 + (past[1].x0 - x0) * (before / u) + (x0_end - x0) * (mean_u - before)
    return target + (start - target) * exp(-h)
