"""Each solver converges to the exact solution, as fast as its order says.

Data ~ N(MU, S^2) is the world whose denoiser, ODE solution and consistency function are known.
"""

from __future__ import annotations

from functools import partial
from math import exp, log, log2, sqrt

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.diffusion.samplers import SAMPLERS, Sampler

MU, S = 0.7, 0.5
HIGH, LOW = 3.0, 0.3


def denoise(x: Tensor, sigma: float) -> Tensor:
    """E[x0 | x]."""
    return (S**2 * x + sigma**2 * MU) / (S**2 + sigma**2)


def solved(x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Where the probability flow ODE leads from one level to another."""
    return MU + (x - MU) * sqrt((S**2 + sigma_next**2) / (S**2 + sigma**2))


def no_noise() -> Tensor:
    raise AssertionError("a deterministic run drew noise")


def zero_noise() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def even_in_log(steps: int) -> list[float]:
    return list(np.geomspace(HIGH, LOW, steps + 1).tolist())


def even(steps: int) -> list[float]:
    return list(np.linspace(HIGH, LOW, steps + 1).tolist())


def with_short_ends(steps: int) -> list[float]:
    """Even in log, but for a very short first and last step, so that a low order there costs nothing."""
    first, *middle, last = even_in_log(steps)
    short = exp((log(HIGH / LOW) / steps) ** 2)
    return [first, first / short, *middle, last * short, last]


def error(run: Sampler, sigmas: list[float]) -> float:
    x = torch.linspace(-6, 6, 8, dtype=torch.float64).reshape(2, 1, 2, 2)
    *_, last = run(denoise, x, sigmas)
    return float((last.x - solved(x, sigmas[0], sigmas[-1])).abs().max())


def plain(name: str) -> Sampler:
    return SAMPLERS[name].function


@pytest.mark.parametrize(
    ("run", "levels", "order"),
    [
        pytest.param(plain("euler"), even_in_log, 1, id="euler"),
        pytest.param(partial(plain("ddim"), noise=no_noise), even_in_log, 1, id="ddim"),
        pytest.param(partial(plain("euler_ancestral"), noise=no_noise, eta=0.0), even_in_log, 1, id="ancestral"),
        pytest.param(plain("heun"), even_in_log, 2, id="heun"),
        pytest.param(plain("plms"), even_in_log, 2, id="plms"),
        pytest.param(plain("plms"), even, 4, id="plms-even"),  # its weights are made for even steps
        pytest.param(plain("dpmpp_2m"), even_in_log, 2, id="dpmpp_2m"),
        pytest.param(partial(plain("dpmpp_2m_sde"), noise=no_noise, eta=0.0), even_in_log, 2, id="2m_sde"),
        pytest.param(partial(plain("dpmpp_sde"), noise=zero_noise, eta=0.0), even_in_log, 2, id="sde"),
        pytest.param(partial(plain("dpmpp_3m_sde"), noise=no_noise, eta=0.0), even_in_log, 2, id="3m_sde"),
        pytest.param(plain("unipc"), even_in_log, 2, id="unipc"),
        pytest.param(plain("unipc"), with_short_ends, 3, id="unipc-inside"),  # its corrector's order
    ],
)
def test_halving_the_steps_divides_the_error_by_two_to_the_order(run: Sampler, levels: object, order: int) -> None:
    assert callable(levels)
    steps = 64 if order > 2 else 256
    coarse, fine = error(run, levels(steps)), error(run, levels(2 * steps))
    assert log2(coarse / fine) == pytest.approx(order, abs=0.2) or log2(coarse / fine) > order > 2
    assert fine < 0.01


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("euler_ancestral", 1),
        ("ddim", 1),
        ("ddpm", 1),
        ("dpmpp_2m_sde", 2),
        ("dpmpp_3m_sde", 2),
        ("dpmpp_sde", 2),
    ],
)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_variance_converges_to_the_datas(name: str, order: int, eta: float) -> None:
    options = {"eta": eta} if SAMPLERS[name].takes_eta else {}
    coarse, fine = (variance_error(name, even_in_log(steps), **options) for steps in (128, 256))
    assert log2(coarse / fine) == pytest.approx(order, abs=0.3)
    assert fine < 0.01


def variance_error(name: str, sigmas: list[float], **options: float) -> float:
    """How far the variance at the end is from that of data and noise: exact, since all is linear in the draws."""
    draws: list[Tensor] = []

    def noise() -> Tensor:
        draws.append(torch.zeros((), dtype=torch.float64, requires_grad=True))
        return draws[-1]

    x = torch.tensor(MU, dtype=torch.float64, requires_grad=True)
    *_, last = SAMPLERS[name].function(denoise, x, sigmas, noise=noise, **options)
    assert last.x.item() == pytest.approx(MU)
    of_x, *of_draws = (float(gradient) for gradient in torch.autograd.grad(last.x, [x, *draws]))
    variance = of_x**2 * (S**2 + sigmas[0] ** 2) + sum(gradient**2 for gradient in of_draws)
    return abs(variance - S**2 - sigmas[-1] ** 2)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_lcm_draws_from_the_data_in_any_number_of_jumps(steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (400_000,)
    x = MU + (S**2 + 14.0**2) ** 0.5 * torch.randn(shape, generator=generator)
    sigmas = [*np.geomspace(14.0, 0.5, steps), 0.0]
    *_, last = plain("lcm")(
        lambda x, sigma: solved(x, sigma, 0.0), x, sigmas, noise=lambda: torch.randn(shape, generator=generator)
    )
    assert last.x.mean().item() == pytest.approx(MU, abs=5e-3)
    assert last.x.std().item() == pytest.approx(S, rel=1e-2)
