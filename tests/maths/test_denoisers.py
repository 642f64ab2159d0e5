"""A network's output means the same clean latents in every form, and guidance does what its papers say."""

from __future__ import annotations

from math import sqrt
from typing import get_args

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from fewstep.diffusion.denoiser import Prediction, consistency, denoiser, output_from_x0, x0_from_output
from fewstep.diffusion.guidance import Guidance, guided
from fewstep.diffusion.schedule import noise_schedule

SCHEDULE = noise_schedule()
every_prediction = pytest.mark.parametrize("prediction", get_args(Prediction))


def normal(seed: int) -> Tensor:
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_prediction
def test_the_true_output_means_the_true_latents(prediction: Prediction) -> None:
    x0, eps, sigma = normal(0), normal(1), 2.5
    alpha_bar = 1 / (1 + sigma**2)
    output = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": sqrt(alpha_bar) * eps - sqrt(1 - alpha_bar) * x0,
    }[prediction]
    x = x0 + sigma * eps
    torch.testing.assert_close(x0_from_output(output, x, sigma, prediction), x0)
    torch.testing.assert_close(output_from_x0(x0, x, sigma, prediction), output)


@every_prediction
def test_the_network_sees_unit_variance_and_its_own_time_step(prediction: Prediction) -> None:
    seen: list[tuple[Tensor, float]] = []

    def predict(x: Tensor, t: float) -> Tensor:
        seen.append((x, t))
        return torch.zeros_like(x).half()  # a network may run in another precision

    x, sigma = normal(0) * 3, SCHEDULE.sigmas[700]
    x0 = denoiser(predict, SCHEDULE, prediction)(x, sigma)
    ((scaled, t),) = seen
    assert t == 700
    assert x0.dtype == x.dtype
    torch.testing.assert_close(scaled, x * sqrt(SCHEDULE.alpha_bar[700]))


def test_a_consistency_denoiser_is_the_identity_at_time_zero_only() -> None:
    def zero(x: Tensor, sigma: float) -> Tensor:
        return torch.zeros_like(x)

    x = normal(0)
    at_0, at_19 = (consistency(zero, SCHEDULE)(x, SCHEDULE.sigmas[t]) for t in (0, 19))
    torch.testing.assert_close(at_0, x * sqrt(SCHEDULE.alpha_bar[0]))  # in the network's own coordinates
    assert at_19.abs().max() < 1e-4


class Pairs:
    """A conditional and an unconditional prediction, and how often each way of asking was used."""

    def __init__(self, prediction: Prediction = "epsilon") -> None:
        self.outputs = {"uncond": normal(1), "cond": normal(2)}
        self.prediction = prediction
        self.calls: list[str] = []

    def cond(self, x: Tensor, sigma: float) -> Tensor:
        self.calls.append("cond")
        return x0_from_output(self.outputs["cond"], x, sigma, self.prediction)

    def pair(self, x: Tensor, sigma: float) -> Tensor:
        self.calls.append("pair")
        assert x.shape[0] == 4
        return x0_from_output(torch.cat(list(self.outputs.values())), x, sigma, self.prediction)

    def guided(self, x: Tensor, sigma: float, guidance: Guidance) -> Tensor:
        return guided(self.cond, self.pair, guidance, self.prediction)(x, sigma)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_without_guidance_only_the_conditional_rows_are_paid_for(scale: float) -> None:
    pairs, x = Pairs(), normal(0)
    assert torch.equal(pairs.guided(x, 2.0, Guidance(scale=scale)), pairs.cond(x, 2.0))
    assert "pair" not in pairs.calls


@every_prediction
def test_guidance_on_clean_latents_is_guidance_on_outputs(prediction: Prediction) -> None:
    pairs, x = Pairs(prediction), normal(0)
    uncond, cond = pairs.outputs.values()
    expected = x0_from_output(uncond + 7.5 * (cond - uncond), x, 2.0, prediction)
    torch.testing.assert_close(pairs.guided(x, 2.0, Guidance(scale=7.5)), expected)
    assert pairs.calls == ["pair"]


def test_guidance_is_linear_in_its_scale() -> None:
    pairs, x = Pairs(), normal(0)
    at_2, at_3, at_4 = (pairs.guided(x, 2.0, Guidance(scale=scale)) for scale in (2.0, 3.0, 4.0))
    torch.testing.assert_close(at_3, (at_2 + at_4) / 2)


@every_prediction
@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescale_is_that_of_diffusers(prediction: Prediction, rescale: float) -> None:
    pairs, x = Pairs(prediction), normal(0)
    uncond, cond = pairs.outputs.values()
    output = rescale_noise_cfg(uncond + 7.5 * (cond - uncond), cond, guidance_rescale=rescale)
    expected = x0_from_output(output, x, 2.0, prediction)
    torch.testing.assert_close(pairs.guided(x, 2.0, Guidance(scale=7.5, rescale=rescale)), expected)


@pytest.mark.parametrize(
    ("sigma", "call"), [(0.2, "cond"), (0.28, "pair"), (2.0, "pair"), (5.42, "pair"), (6.0, "cond")]
)
def test_outside_its_interval_guidance_is_off_and_free(sigma: float, call: str) -> None:
    pairs = Pairs()
    pairs.guided(normal(0), sigma, Guidance(scale=7.5, interval=(0.28, 5.42)))
    assert pairs.calls == [call]
