"""Denoisers: what a network predicts, in whatever form it was trained, as `(x, sigma) -> x0`."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Literal

from torch import Tensor

from fewstep.diffusion.schedule import NoiseSchedule

Denoiser = Callable[[Tensor, float], Tensor]
"""`(x, sigma) -> x0`, both (B, C, H, W): the expected clean latents of `x = x0 + sigma * eps`."""

Predict = Callable[[Tensor, float], Tensor]
"""`(x / sqrt(1 + sigma^2), t) -> output`, both (B, C, H, W): the network, its conditions already bound."""

Prediction = Literal["epsilon", "v_prediction", "sample"]
"""What the network's output is: the noise, `v` (arXiv:2202.00512, app. D), or the clean latents."""


def denoiser(predict: Predict, schedule: NoiseSchedule, prediction: Prediction = "epsilon") -> Denoiser:
    """A denoiser from a network that was trained on `schedule`, called once for each evaluation.

    The network sees unit variance and a time step; its output is brought to the dtype of `x` first.
    """

    def denoise(x: Tensor, sigma: float) -> Tensor:
        output = predict(x / sqrt(1 + sigma**2), schedule.sigma_to_t(sigma))
        return x0_from_output(output.to(x.dtype), x, sigma, prediction)

    return denoise


def x0_from_output(output: Tensor, x: Tensor, sigma: float, prediction: Prediction) -> Tensor:
    """The clean latents that a network's `output` at (`x`, `sigma`) means."""
    c_skip, c_out = _scalings(sigma, prediction)
    return c_skip * x + c_out * output


def output_from_x0(x0: Tensor, x: Tensor, sigma: float, prediction: Prediction) -> Tensor:
    """The output with which a network at (`x`, `sigma`) would mean `x0`: the inverse of `x0_from_output`."""
    c_skip, c_out = _scalings(sigma, prediction)
    return (x0 - c_skip * x) / c_out


def training_target(x0: Tensor, eps: Tensor, alpha_bar: Tensor, prediction: Prediction) -> Tensor:
    """The output to train towards at `sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps`; all of one shape, or broadcast."""
    match prediction:
        case "epsilon":
            return eps
        case "v_prediction":
            return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
        case "sample":
            return x0


def x0_from_training_output(output: Tensor, x: Tensor, alpha_bar: Tensor, prediction: Prediction) -> Tensor:
    """`x0_from_output` for x = `sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps`: the inverse of `training_target`."""
    match prediction:
        case "epsilon":
            return (x - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt()
        case "v_prediction":
            return alpha_bar.sqrt() * x - (1 - alpha_bar).sqrt() * output
        case "sample":
            return output


def _scalings(sigma: float, prediction: Prediction) -> tuple[float, float]:
    """`c_skip` and `c_out` of `x0 = c_skip * x + c_out * output` (arXiv:2206.00364, table 1)."""
    match prediction:
        case "epsilon":
            return 1.0, -sigma
        case "v_prediction":
            return 1 / (1 + sigma**2), -sigma / sqrt(1 + sigma**2)
        case "sample":
            return 0.0, 1.0


def consistency(denoise: Denoiser, schedule: NoiseSchedule) -> Denoiser:
    """The denoiser of a latent consistency model: the identity at t = 0, `denoise` a few steps above.

    The boundary condition of arXiv:2310.04378, with the usual sigma_data 0.5 and time steps scaled by 10.
    """

    def consistent(x: Tensor, sigma: float) -> Tensor:
        ratio = 10 * schedule.sigma_to_t(sigma) / 0.5
        c_skip, c_out = 1 / (1 + ratio**2), ratio / sqrt(1 + ratio**2)
        return c_skip / sqrt(1 + sigma**2) * x + c_out * denoise(x, sigma)

    return consistent
