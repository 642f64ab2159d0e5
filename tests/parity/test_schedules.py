"""Noise levels and time steps are those of diffusers."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import AysSchedules

from fewstep.diffusion.samplers import SAMPLERS
from fewstep.diffusion.schedule import noise_schedule, sigmas_for

TRAINED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE = noise_schedule()


TIMES = {sigma: t for t, sigma in enumerate(SCHEDULE.sigmas)}


@pytest.mark.parametrize("kind", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_alpha_bar_is_that_of_diffusers(kind: Any) -> None:
    theirs = diffusers.DDIMScheduler(beta_schedule=kind, beta_start=0.00085, beta_end=0.012).alphas_cumprod
    np.testing.assert_allclose(noise_schedule(kind).alpha_bar, theirs.double().numpy(), rtol=1e-6)


def test_zero_terminal_snr_is_that_of_diffusers() -> None:
    theirs = diffusers.EulerDiscreteScheduler(**TRAINED, rescale_betas_zero_snr=True)
    ours = noise_schedule(zero_terminal_snr=True)
    sigmas = theirs.sigmas[:-1].flip(0).double().numpy()
    np.testing.assert_allclose(ours.sigmas[:-1], sigmas[:-1], rtol=2e-4)  # theirs loses digits near 0 and T
    np.testing.assert_allclose(ours.sigmas[10:-100], sigmas[10:-100], rtol=1e-5)
    assert ours.sigmas[-1] == pytest.approx(float(sigmas[-1])) == pytest.approx(4096, rel=1e-6)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_leading_and_trailing_are_ddims_at_every_number_of_steps(spacing: str, steps_offset: int) -> None:
    scheduler = diffusers.DDIMScheduler(**TRAINED, timestep_spacing=spacing, steps_offset=steps_offset)
    # 1000 leading steps with an offset reach t = 1000, which the model does not have; diffusers crashes.
    for steps in range(1, 1000 if spacing == "leading" and steps_offset else 1001):
        scheduler.set_timesteps(steps)
        sigmas = sigmas_for(spacing, steps, SCHEDULE, steps_offset=steps_offset)[:-1]
        # Float error gives diffusers' arange one time step too many at some counts: -1.
        assert [TIMES[sigma] for sigma in sigmas] == scheduler.timesteps[:steps].tolist()


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_the_multistep_solvers_read_two_spacings_their_own_way(spacing: str) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**TRAINED, timestep_spacing=spacing, steps_offset=1)
    for steps in range(1, 999):  # above, leading steps reach t = 1000 in diffusers, which the model does not have
        scheduler.set_timesteps(steps)
        sigmas = sigmas_for(spacing, steps, SCHEDULE, steps_offset=1, convention="multistep")[:-1]
        assert [TIMES[sigma] for sigma in sigmas] == scheduler.timesteps.tolist()


def test_consistency_models_visit_the_steps_they_were_distilled_on() -> None:
    scheduler = diffusers.LCMScheduler(**TRAINED)
    for steps in range(1, 51):
        scheduler.set_timesteps(steps)
        sigmas = sigmas_for("leading", steps, SCHEDULE, convention="lcm")[:-1]
        assert [TIMES[sigma] for sigma in sigmas] == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [2, 3, 20, 50, 999])
def test_eulers_linspace_lies_between_whole_time_steps(steps: int) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**TRAINED, timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    ours = sigmas_for("linspace", steps, SCHEDULE, convention="euler")
    np.testing.assert_allclose(ours, scheduler.sigmas.double().numpy(), rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 20, 50, 1000])
@pytest.mark.parametrize("name", ["karras", "exponential"])
def test_curves_are_those_of_the_multistep_solvers(name: str, steps: int) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**TRAINED, **{f"use_{name}_sigmas": True})
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(sigmas_for(name, steps, SCHEDULE), scheduler.sigmas.double().numpy(), rtol=2e-6)


@pytest.mark.parametrize(
    ("family", "table"), [("sd", "StableDiffusionTimesteps"), ("sdxl", "StableDiffusionXLTimesteps")]
)
def test_ten_aligned_steps_are_the_published_ones(family: str, table: str) -> None:
    sigmas = sigmas_for("align_your_steps", 10, SCHEDULE, family=family)[:-1]
    assert [SCHEDULE.sigma_to_t(sigma) for sigma in sigmas] == pytest.approx(AysSchedules[table], abs=1e-6)


@pytest.mark.parametrize("t", [0, 1, 500, 998, 999])
def test_time_steps_and_levels_are_exact_inverses_on_the_grid(t: int) -> None:
    assert SCHEDULE.t_to_sigma(t) == SCHEDULE.sigmas[t]
    assert SCHEDULE.sigma_to_t(SCHEDULE.sigmas[t]) == t


def test_fractional_time_steps_are_those_of_diffusers() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**TRAINED)
    log_sigmas = np.log(SCHEDULE.sigmas)
    for sigma in (0.03, 0.5, 3.3, 14.0):
        assert SCHEDULE.sigma_to_t(sigma) == pytest.approx(scheduler._sigma_to_t(np.array(sigma), log_sigmas))
    assert SCHEDULE.sigma_to_t(100.0) == 999
    assert SCHEDULE.sigma_to_t(0.001) == 0


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("euler", "EulerDiscreteScheduler"),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler"),
        ("heun", "HeunDiscreteScheduler"),
        ("ddim", "DDIMScheduler"),
        ("plms", "PNDMScheduler"),
        ("dpmpp_2m", "DPMSolverMultistepScheduler"),
        ("dpmpp_2m_sde", "DPMSolverMultistepScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
        ("lcm", "LCMScheduler"),
        ("ddpm", "DDPMScheduler"),
    ],
)
def test_runs_start_at_the_scale_of_diffusers(name: str, scheduler: str, spacing: str) -> None:
    built = getattr(diffusers, scheduler)(**TRAINED, timestep_spacing=spacing)
    built.set_timesteps(20)
    theirs = torch.as_tensor(built.init_noise_sigma)
    if hasattr(built, "sigmas"):
        sigma = float(built.sigmas.max())
    else:
        sigma = SCHEDULE.t_to_sigma(built.timesteps.max())
    if SAMPLERS[name].convention != "euler":
        theirs = theirs * (1 + sigma**2) ** 0.5  # there x is in the network's coordinates
    assert SAMPLERS[name].initial_scale(spacing, sigma) == pytest.approx(float(theirs), rel=1e-6)
