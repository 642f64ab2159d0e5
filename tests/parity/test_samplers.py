"""Every sampler walks the same way as its counterpart in diffusers, or as k-diffusion's formulas written out here.

The model is a small deterministic nonlinear function of (x, t) in float32; both sides get the same start and,
through generators with one seed, the same noise. Left out, with the reason, are the cases where diffusers
itself does something else than the method says:

- PNDM with v-prediction mixes past outputs, not past noises, although v means something else at each level; a
  sampler here never sees the output, so `plms` is compared for epsilon only.
- DDIM with `trailing` at 3 and 9 steps (not divisors of 1000) goes to `t - 1000 // steps`, which is not the next
  time step it visits, so a step lands between two levels. The same for PNDM; both are compared on `leading`.
- DPMSolverMultistep and UniPC round the time steps of karras levels, and DDPM, LCM, PNDM and DDIM have no such
  levels: karras is compared with Euler and Heun.
- DPMSolverSDE needs the package torchsde; it is k-diffusion's sampler, whose formulas are used instead.
- LCM refuses more steps than its 50 original ones, and DDPM etc. at 1 step with `leading` start at t = 0 or 1:
  compared all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import exp, expm1, log, sqrt
from typing import Any

import diffusers
import pytest
import torch
from fewstep.diffusion.denoiser import Denoiser, Prediction, consistency, denoiser
from fewstep.diffusion.samplers import SAMPLERS
from fewstep.diffusion.schedule import NoiseSchedule, noise_schedule, sigmas_for
from fewstep.diffusion.step import Noise, Step
from torch import Tensor

SHAPE = (2, 4, 4, 4)
STEPS = (1, 2, 3, 9, 20, 50)
TOLERANCE = 1e-5
TRAINED: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return noise_schedule()


@pytest.fixture(scope="module")
def predict() -> Callable[[Tensor, Any], Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(64, 64, generator=generator) / 8
    shift = torch.randn(64, generator=generator)

    def network(x: Tensor, t: Any) -> Tensor:
        hidden = x.flatten(1) @ weight + shift * float(t) / 1000
        return torch.tanh(hidden).reshape(x.shape) + 0.2 * x

    return network


def seeded_noise(seed: int = 11) -> Noise:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(SHAPE, generator=generator)


def walked(steps: Iterator[Step]) -> Tensor:
    """The last x of a run, in the network's own coordinates."""
    *_, last = steps
    return last.x / sqrt(1 + last.sigma**2)


def reference(scheduler: Any, steps: int, predict: Callable[[Tensor, Any], Tensor], **options: Any) -> Tensor:
    """The last x of diffusers' loop."""
    scheduler.set_timesteps(steps)
    x = seeded_noise(5)() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(predict(scheduler.scale_model_input(x, t), t), t, x, **options).prev_sample
    return x


def levels(scheduler: Any, steps: int, schedule: NoiseSchedule, final: float = 0.0) -> tuple[float, ...]:
    """The levels of diffusers' time steps (Heun and PNDM list some twice)."""
    scheduler.set_timesteps(steps)
    return (*(schedule.t_to_sigma(t) for t in dict.fromkeys(scheduler.timesteps.tolist())), final)


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert torch.isfinite(theirs).all()
    return float((ours - theirs).abs().max() / theirs.abs().max())


Case = tuple[str, str, dict[str, Any], dict[str, Any]]
"""Our sampler and its options, diffusers' scheduler class, and its configuration."""

CASES: list[Case] = [
    ("euler", "EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, {}),
    ("euler", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, {}),
    ("euler_ancestral", "EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, {}),
    ("heun", "HeunDiscreteScheduler", {"timestep_spacing": "trailing"}, {}),
    ("ddim", "DDIMScheduler", {"clip_sample": False, "steps_offset": 1}, {}),
    ("ddim", "DDIMScheduler", {"clip_sample": False, "steps_offset": 1}, {"eta": 0.7}),
    ("ddim", "DDIMScheduler", {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}, {}),
    ("plms", "PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}, {}),
    ("plms", "PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": True}, {}),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", {"timestep_spacing": "linspace"}, {}),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, {}),
    ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("unipc", "UniPCMultistepScheduler", {"timestep_spacing": "linspace"}, {}),
    ("unipc", "UniPCMultistepScheduler", {"timestep_spacing": "trailing"}, {}),
    ("lcm", "LCMScheduler", {}, {}),
    ("ddpm", "DDPMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, {}),
]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{'-'.join(map(str, case[2].values()))}")
def test_a_sampler_ends_where_diffusers_does(
    case: Case,
    prediction: Prediction,
    steps: int,
    schedule: NoiseSchedule,
    predict: Callable[[Tensor, Any], Tensor],
    record_property: Callable[[str, object], None],
) -> None:
    name, scheduler_class, config, options = case
    if name == "plms" and prediction != "epsilon":
        pytest.skip("diffusers' PNDM mixes outputs, not noises")
    scheduler = getattr(diffusers, scheduler_class)(**TRAINED, prediction_type=prediction, **config)
    spec = SAMPLERS[name]
    theirs_options = dict(options)
    if spec.takes_noise:
        theirs_options["generator"] = torch.Generator().manual_seed(11)
    theirs = reference(scheduler, steps, predict, **theirs_options)

    low_end = config.get("set_alpha_to_one") is False or config.get("final_sigmas_type") == "sigma_min"
    sigmas = levels(scheduler, steps, schedule, schedule.sigmas[0] if low_end else 0.0)
    denoise = denoiser(predict, schedule, prediction)
    if spec.consistency:
        denoise = consistency(denoise, schedule)
    x = seeded_noise(5)() * spec.initial_scale(config.get("timestep_spacing", "linspace"), sigmas[0])
    ours = walked(spec(denoise, x, sigmas, noise=seeded_noise(), **options))
    if low_end and name == "dpmpp_2m":
        ours = ours * 1.0
    difference = relative(ours, theirs)
    record_property("difference", difference)
    assert difference < TOLERANCE
