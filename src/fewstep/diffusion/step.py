"""What all samplers share: the step they yield, where their noise comes from, and the ancestral move."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, log, sqrt
from typing import NamedTuple

from torch import Tensor

Noise = Callable[[], Tensor]
"""A fresh draw of unit noise, (B, C, H, W), at each call; whoever makes it decides on seeds."""


class Step(NamedTuple):
    """What a sampler yields: `x` (B, C, H, W) at level `sigma`, and the clean latents `x0` it came from.

    `x` is the sampler's own tensor: the next step starts from it, so a caller who writes into it steers the
    run, except `unipc`, which redoes the step.
    """

    x: Tensor
    x0: Tensor
    sigma: float


def log_step(sigma: float, sigma_next: float) -> float:
    """The length of a step in log-SNR / 2, the `h` of arXiv:2211.01095; infinite when it ends at 0."""
    return log(sigma / sigma_next) if sigma_next > 0 else inf


def ancestral_split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """The level an ODE step goes down to, and the std of the noise that then brings it up to `sigma_next`.

    `eta` = 0 is no noise, 1 the variance of the true posterior: DDIM's sigma_t, arXiv:2010.02502 eq. 16, in
    sigma coordinates.
    """
    up = eta * sigma_next * sqrt(1 - (sigma_next / sigma) ** 2)
    return sqrt(sigma_next**2 - up**2), up
