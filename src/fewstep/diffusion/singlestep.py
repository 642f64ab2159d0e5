"""Samplers that remember nothing from one step to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import sqrt

from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.step import Noise, Step, ancestral_split


def euler(denoise: Denoiser, x: Tensor, sigmas: Sequence[float]) -> Iterator[Step]:
    """Euler steps of the probability flow ODE `dx/dsigma = (x - x0) / sigma` (arXiv:2206.00364, Alg. 1).

    `x` (B, C, H, W) is at level `sigmas[0]`; `sigmas` falls, and may end at 0: so for every sampler.
    """
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        x = x0 + (x - x0) * (sigma_next / sigma)
        yield Step(x, x0, sigma_next)


def euler_ancestral(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], *, noise: Noise, eta: float = 1.0
) -> Iterator[Step]:
    """Euler steps with fresh noise after each one; `eta`, 0 ... 1, is its share of the posterior's."""
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        down, up = ancestral_split(sigma, sigma_next, eta)
        x = x0 + (x - x0) * (down / sigma)
        if up > 0:
            x = x + up * noise()
        yield Step(x, x0, sigma_next)


def ddim(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], *, noise: Noise, eta: float = 0.0) -> Iterator[Step]:
    """DDIM (arXiv:2010.02502, eq. 12): in sigma coordinates `euler_ancestral`, without noise by default."""
    return euler_ancestral(denoise, x, sigmas, noise=noise, eta=eta)


def ddpm(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], *, noise: Noise) -> Iterator[Step]:
    """DDPM (arXiv:2006.11239, Alg. 2), posterior variance: DDIM with `eta` = 1 (arXiv:2010.02502, sec. 4.1)."""
    return euler_ancestral(denoise, x, sigmas, noise=noise, eta=1.0)


def heun(denoise: Denoiser, x: Tensor, sigmas: Sequence[float]) -> Iterator[Step]:
    """Heun's second-order steps (arXiv:2206.00364, Alg. 1): two evaluations each, one in a step to 0."""
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        ahead = x0 + (x - x0) * (sigma_next / sigma)
        if sigma_next > 0:
            slope = (x - x0) / sigma + (ahead - denoise(ahead, sigma_next)) / sigma_next
            ahead = x + slope / 2 * (sigma_next - sigma)
        x = ahead
        yield Step(x, x0, sigma_next)


def dpmpp_sde(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], *, noise: Noise, eta: float = 1.0
) -> Iterator[Step]:
    """DPM-Solver++(2S) as an SDE, with r = 1/2: two evaluations a step, one in a step to 0.

    k-diffusion's `sample_dpmpp_sde` (arXiv:2211.01095, Alg. 1, with noise). As there, the two noises of a
    step belong to one Brownian path; two fresh draws make them, not a Brownian tree, so another number of
    steps follows another path.
    """
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        if sigma_next > 0:
            middle = sqrt(sigma * sigma_next)
            early, late = noise(), noise()
            x0 = denoise(_ancestral(x, x0, sigma, middle, eta, early), middle)
            share = (sigma - middle) / (sigma - sigma_next)  # of the path, in the first half
            x = _ancestral(x, x0, sigma, sigma_next, eta, sqrt(share) * early + sqrt(1 - share) * late)
        else:
            x = x0
        yield Step(x, x0, sigma_next)


def _ancestral(x: Tensor, x0: Tensor, sigma: float, sigma_next: float, eta: float, noise: Tensor) -> Tensor:
    """One step of `euler_ancestral`."""
    down, up = ancestral_split(sigma, sigma_next, eta)
    return x0 + (x - x0) * (down / sigma) + up * noise


def lcm(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], *, noise: Noise) -> Iterator[Step]:
    """Multistep consistency sampling (arXiv:2303.01469, Alg. 1): jump to `x0`, noise up to the next level.

    `denoise` should be a `consistency` denoiser, and `sigmas` should end at 0.
    """
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        x = x0 + sigma_next * noise() if sigma_next > 0 else x0
        yield Step(x, x0, sigma_next)
