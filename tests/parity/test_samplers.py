"""Every sampler walks the same way as its counterpart in diffusers, or as k-diffusion's formulas written out.

The model is a small, deterministic, nonlinear function of (x, t) in float32; both sides get the same start and,
through generators with one seed, the same noise. Left out are cases where diffusers does not do what the
method says:

- PNDM with v-prediction mixes past outputs as if they were noises, although v means something else at each
  level. A sampler here never sees outputs, so `plms` is compared for epsilon only.
- DDIM and PNDM step from t to `t - 1000 // steps`. With `trailing` and a number of steps that does not divide
  1000 that is not the next time step they visit, so they are compared on `leading`.
- PNDM in the middle of a schedule (image to image) takes its second time step for the repeated one, and is a
  step off from then on; `plms` starts afresh wherever it starts. Only whole runs are compared.
- DPMSolverMultistep and UniPC round the time steps of karras levels before they ask the model, and DDIM,
  PNDM, DDPM and LCM have no such levels: karras is compared with Euler and Heun.
- DDIM and DDPM let zero-terminal-SNR schedules reach sigma = infinity; Euler and the multistep solvers stop
  at 4096, as here.
- DPMSolverSDE needs a package for Brownian trees. It is k-diffusion's sampler: see `k_dpmpp_sde`.
- The third-order SDE step of DPMSolverMultistep has a coefficient that does not vanish with the step (one half with
  the wrong sign); `dpmpp_3m_sde` is compared with k-diffusion's: see `k_dpmpp_3m_sde`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from math import sqrt
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser, Prediction, consistency, denoiser
from fewstep.diffusion.samplers import SAMPLERS
from fewstep.diffusion.schedule import noise_schedule, sigmas_for
from fewstep.diffusion.step import Noise, Step
from fewstep.weights.scheduler import SchedulerConfig

SHAPE = (2, 4, 4, 4)
STEPS = (1, 2, 3, 9, 20, 50)
TOLERANCE = 1e-5
TRAINED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE = noise_schedule()

Network = Callable[[Tensor, Any], Tensor]


@pytest.fixture(scope="module")
def predict() -> Network:
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


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert torch.isfinite(theirs).all()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def last_x(steps: Iterator[Step]) -> Tensor:
    """The last x of a run, in the network's own coordinates, as diffusers leaves it."""
    *_, last = steps
    return last.x / sqrt(1 + last.sigma**2)


def last_x_of_diffusers(scheduler: Any, steps: int, predict: Network, **options: Any) -> Tensor:
    scheduler.set_timesteps(steps)
    x = seeded_noise(5)() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(predict(scheduler.scale_model_input(x, t), t), t, x, **options).prev_sample
    return x


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One of our samplers and the scheduler of diffusers that it should agree with."""

    sampler: str
    scheduler: str
    config: dict[str, Any] = field(default_factory=dict)
    eta: float | None = None
    predictions: tuple[Prediction, ...] = ("epsilon", "v_prediction")
    tolerance: float = TOLERANCE

    def __str__(self) -> str:
        return "-".join(map(str, (self.sampler, self.scheduler, *self.config.values())))

    def theirs(self, prediction: Prediction, steps: int, predict: Network) -> Tensor:
        scheduler = self.built(prediction)
        options = {} if self.eta is None else {"eta": self.eta}
        if SAMPLERS[self.sampler].takes_noise:
            options["generator"] = torch.Generator().manual_seed(11)
        return last_x_of_diffusers(scheduler, steps, predict, **options)

    def ours(self, prediction: Prediction, steps: int, predict: Network) -> Tensor:
        spec = SAMPLERS[self.sampler]
        denoise = denoiser(predict, SCHEDULE, prediction)
        if spec.consistency:
            denoise = consistency(denoise, SCHEDULE)
        sigmas = self.sigmas(prediction, steps)
        x = seeded_noise(5)() * spec.initial_scale(self.config.get("timestep_spacing", "linspace"), sigmas[0])
        return last_x(spec(denoise, x, sigmas, noise=seeded_noise(), eta=self.eta))

    def built(self, prediction: Prediction) -> Any:
        return getattr(diffusers, self.scheduler)(**TRAINED, prediction_type=prediction, **self.config)

    def sigmas(self, prediction: Prediction, steps: int) -> tuple[float, ...]:
        """The levels of the time steps of diffusers, which lists some twice for Heun and PNDM."""
        scheduler = self.built(prediction)
        scheduler.set_timesteps(steps)
        ends_low = "sigma_min" in self.config.values() or self.config.get("set_alpha_to_one") is False
        times = dict.fromkeys(scheduler.timesteps.tolist())
        return (*map(SCHEDULE.t_to_sigma, times), SCHEDULE.sigmas[0] if ends_low else 0.0)


DDIM = {"clip_sample": False, "steps_offset": 1}
PNDM = {"skip_prk_steps": True, "steps_offset": 1}
PAIRS = (
    Pair(sampler="euler", scheduler="EulerDiscreteScheduler", config={"timestep_spacing": "leading"}),
    Pair(sampler="euler", scheduler="EulerDiscreteScheduler", config={"timestep_spacing": "trailing"}),
    Pair(
        sampler="euler_ancestral",
        scheduler="EulerAncestralDiscreteScheduler",
        config={"timestep_spacing": "trailing"},
    ),
    Pair(sampler="heun", scheduler="HeunDiscreteScheduler", config={"timestep_spacing": "trailing"}),
    Pair(sampler="ddim", scheduler="DDIMScheduler", config=DDIM),
    Pair(sampler="ddim", scheduler="DDIMScheduler", config=DDIM, eta=0.7),
    Pair(sampler="ddim", scheduler="DDIMScheduler", config={**DDIM, "set_alpha_to_one": False}, eta=0.7),
    Pair(
        sampler="plms",
        scheduler="PNDMScheduler",
        config={**PNDM, "set_alpha_to_one": False},
        predictions=("epsilon",),
    ),
    Pair(
        sampler="plms",
        scheduler="PNDMScheduler",
        config={**PNDM, "set_alpha_to_one": True},
        predictions=("epsilon",),
    ),
    Pair(sampler="dpmpp_2m", scheduler="DPMSolverMultistepScheduler"),
    Pair(sampler="dpmpp_2m", scheduler="DPMSolverMultistepScheduler", config={"timestep_spacing": "trailing"}),
    Pair(
        sampler="dpmpp_2m",
        scheduler="DPMSolverMultistepScheduler",
        config={"final_sigmas_type": "sigma_min"},
    ),
    Pair(
        sampler="dpmpp_2m_sde",
        scheduler="DPMSolverMultistepScheduler",
        config={"algorithm_type": "sde-dpmsolver++"},
    ),
    Pair(sampler="unipc", scheduler="UniPCMultistepScheduler"),
    Pair(sampler="unipc", scheduler="UniPCMultistepScheduler", config={"final_sigmas_type": "sigma_min"}),
    Pair(sampler="lcm", scheduler="LCMScheduler", tolerance=5 * TOLERANCE),  # each step divides rounding by alpha anew
    Pair(sampler="ddpm", scheduler="DDPMScheduler", config=DDIM),
    Pair(sampler="ddpm", scheduler="DDPMScheduler", config={**DDIM, "timestep_spacing": "trailing"}),
)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("pair", "prediction"), [(pair, prediction) for pair in PAIRS for prediction in pair.predictions], ids=str
)
def test_a_sampler_ends_where_diffusers_does(pair: Pair, prediction: Prediction, steps: int, predict: Network) -> None:
    ours, theirs = pair.ours(prediction, steps, predict), pair.theirs(prediction, steps, predict)
    assert difference(ours, theirs) < pair.tolerance


@pytest.mark.parametrize("steps", STEPS[1:])  # at 1, diffusers takes its highest karras level from t = 0
@pytest.mark.parametrize(
    ("name", "scheduler"), [("euler", "EulerDiscreteScheduler"), ("heun", "HeunDiscreteScheduler")]
)
def test_karras_levels_and_fractional_time_steps_agree(name: str, scheduler: str, steps: int, predict: Network) -> None:
    built = getattr(diffusers, scheduler)(**TRAINED, use_karras_sigmas=True)
    theirs = last_x_of_diffusers(built, steps, predict)
    sigmas = sigmas_for("karras", steps, SCHEDULE)
    x = seeded_noise(5)() * SAMPLERS[name].initial_scale("karras", sigmas[0])
    ours = last_x(SAMPLERS[name](denoiser(predict, SCHEDULE), x, sigmas, noise=seeded_noise()))
    assert difference(ours, theirs) < 5 * TOLERANCE  # Heun's step from 14.6 to 0.03 divides rounding by 0.03


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("name", "scheduler", "tolerance"),
    [
        ("dpmpp_2m", "DPMSolverMultistepScheduler", TOLERANCE),
        ("unipc", "UniPCMultistepScheduler", TOLERANCE),
        ("euler", "EulerDiscreteScheduler", 5e-4),  # theirs takes differences of 4096 in float32
    ],
)
def test_zero_terminal_snr_agrees(name: str, scheduler: str, tolerance: float, steps: int, predict: Network) -> None:
    config = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    built = getattr(diffusers, scheduler)(**TRAINED, prediction_type="v_prediction", **config)
    theirs = last_x_of_diffusers(built, steps, predict)
    schedule = noise_schedule(zero_terminal_snr=True)
    sigmas = sigmas_for("trailing", steps, schedule)
    x = seeded_noise(5)() * SAMPLERS[name].initial_scale("trailing", sigmas[0])
    denoise = denoiser(predict, schedule, "v_prediction")
    ours = last_x(SAMPLERS[name](denoise, x, sigmas, noise=seeded_noise()))
    assert difference(ours, theirs) < tolerance


def k_ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    up = min(sigma_next, eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    return (sigma_next**2 - up**2) ** 0.5, up


def k_dpmpp_sde(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, eta: float) -> Tensor:
    """k-diffusion's `sample_dpmpp_sde` with r = 1/2; its Brownian tree is a path that grows as it is read."""
    levels = torch.tensor(sigmas, dtype=torch.float64)
    for sigma, sigma_next in pairwise(levels):
        x0 = denoise(x, float(sigma))
        if sigma_next == 0:
            x = x + (x - x0) / sigma * (sigma_next - sigma)
            continue
        t, t_next = -sigma.log(), -sigma_next.log()
        s = t + (t_next - t) / 2
        middle = (-s).exp()
        path = {sigma: torch.zeros(())}
        path[middle] = path[sigma] + (sigma - middle).sqrt() * noise()
        path[sigma_next] = path[middle] + (middle - sigma_next).sqrt() * noise()

        down, up = k_ancestral(float(sigma), float(middle), eta)
        s_down = -torch.tensor(down, dtype=torch.float64).log()
        x2 = ((-s_down).exp() / sigma) * x - (t - s_down).expm1() * x0
        x2 = x2 + (path[middle] - path[sigma]) / (sigma - middle).sqrt() * up
        x0 = denoise(x2, float(middle))

        down, up = k_ancestral(float(sigma), float(sigma_next), eta)
        t_down = -torch.tensor(down, dtype=torch.float64).log()
        x = ((-t_down).exp() / sigma) * x - (t - t_down).expm1() * x0
        x = x + (path[sigma_next] - path[sigma]) / (sigma - sigma_next).sqrt() * up
    return x


def k_dpmpp_2m_sde(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, eta: float) -> Tensor:
    """k-diffusion's `sample_dpmpp_2m_sde`, midpoint; there a run of one step raises UnboundLocalError."""
    levels = torch.tensor(sigmas, dtype=torch.float64)
    before: tuple[Tensor, Tensor] | None = None
    for sigma, sigma_next in pairwise(levels):
        x0 = denoise(x, float(sigma))
        if sigma_next == 0:
            return x0
        h = sigma.log() - sigma_next.log()
        x = sigma_next / sigma * (-eta * h).exp() * x + (-h - eta * h).expm1().neg() * x0
        if before is not None:
            r = before[1] / h
            x = x + 0.5 * (-h - eta * h).expm1().neg() * (1 / r) * (x0 - before[0])
        x = x + noise() * sigma_next * (-2 * eta * h).expm1().neg().sqrt()
        before = (x0, h)
    return x


def k_dpmpp_3m_sde(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, eta: float) -> Tensor:
    """k-diffusion's `sample_dpmpp_3m_sde`; there a run of one step raises UnboundLocalError."""
    levels = torch.tensor(sigmas, dtype=torch.float64)
    before: list[tuple[Tensor, Tensor]] = []
    for sigma, sigma_next in pairwise(levels):
        x0 = denoise(x, float(sigma))
        if sigma_next == 0:
            return x0
        h = sigma.log() - sigma_next.log()
        h_eta = h * (eta + 1)
        x = (-h_eta).exp() * x + (-h_eta).expm1().neg() * x0
        phi_2 = (-h_eta).expm1() / h_eta + 1
        phi_3 = phi_2 / h_eta - 0.5
        if len(before) == 2:
            (x0_1, h_1), (x0_2, h_2) = before
            r0, r1 = h_1 / h, h_2 / h
            d1_0, d1_1 = (x0 - x0_1) / r0, (x0_1 - x0_2) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            d2 = (d1_0 - d1_1) / (r0 + r1)
            x = x + phi_2 * d1 - phi_3 * d2
        elif before:
            x0_1, h_1 = before[0]
            x = x + phi_2 * (x0 - x0_1) / (h_1 / h)
        x = x + noise() * sigma_next * (-2 * h * eta).expm1().neg().sqrt()
        before = [(x0, h), *before[:1]]
    return x


K_DIFFUSION = {"dpmpp_sde": k_dpmpp_sde, "dpmpp_2m_sde": k_dpmpp_2m_sde, "dpmpp_3m_sde": k_dpmpp_3m_sde}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.6, 1.0])
@pytest.mark.parametrize("name", K_DIFFUSION)
def test_a_sampler_ends_where_k_diffusions_formulas_do(
    name: str, eta: float, prediction: Prediction, steps: int, predict: Network
) -> None:
    sigmas = sigmas_for("karras", steps, SCHEDULE)
    denoise = denoiser(predict, SCHEDULE, prediction)
    x = seeded_noise(5)() * SAMPLERS[name].initial_scale("karras", sigmas[0])
    theirs = K_DIFFUSION[name](denoise, x, sigmas, seeded_noise(), eta)
    ours = last_x(SAMPLERS[name](denoise, x, sigmas, noise=seeded_noise(), eta=eta))
    assert difference(ours, theirs) < TOLERANCE


PUBLISHED: dict[str, dict[str, Any]] = {
    "sd-v1-4": {
        "_class_name": "PNDMScheduler",
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    },
    "sd-v2-1": {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    },
    "sdxl-base": {
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "use_karras_sigmas": False,
        "clip_sample": False,
    },
}
PUBLISHED["sd-turbo"] = PUBLISHED["sdxl-base"] | {"timestep_spacing": "trailing", "timestep_type": "discrete"}
PUBLISHED["sdxl-turbo"] = PUBLISHED["sd-turbo"] | {"_class_name": "EulerAncestralDiscreteScheduler"}
"""What the published scheduler_config.json of each model says, beside the betas in `TRAINED`."""

CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "plms": ("PNDMScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
}


def unlike(model: str, name: str, steps: int) -> bool:
    """What is left out: see above; and at one step, Euler's linspace starts from t = 0 in diffusers."""
    spacing = PUBLISHED[model].get("timestep_spacing", SAMPLERS[name].spacing)
    return (
        (model, name) == ("sd-v2-1", "plms")
        or (spacing == "trailing" and name in ("ddim", "plms") and 1000 % steps > 0)
        or (spacing == "trailing" and name == "plms" and steps > 1)  # its repeated step is not the next one visited
        or (spacing == "linspace" and SAMPLERS[name].convention == "euler" and steps == 1)
    )


@pytest.mark.parametrize(
    ("model", "name", "steps"),
    [row for row in product(PUBLISHED, CLASSES, (1, 2, 3, 12, 50)) if not unlike(*row)],
)
def test_a_sampler_starts_where_diffusers_does_when_nobody_names_a_spacing(
    model: str, name: str, steps: int, predict: Network
) -> None:
    """A published config names a spacing or none; then it is the one of the class that is asked for."""
    config = TRAINED | PUBLISHED[model]
    own = SchedulerConfig.from_diffusers(config)
    scheduler, more = CLASSES[name]
    options = {"generator": torch.Generator().manual_seed(11)} if SAMPLERS[name].takes_noise else {}
    theirs = last_x_of_diffusers(getattr(diffusers, scheduler).from_config(config, **more), steps, predict, **options)
    spec, schedule = SAMPLERS[name], own.schedule_for(name)
    levels = {"steps_offset": own.steps_offset, "final": own.final_for(name), "convention": spec.convention}
    sigmas = sigmas_for(schedule, steps, own.noise_schedule, **levels)
    denoise = denoiser(predict, own.noise_schedule, own.prediction)
    if spec.consistency:
        denoise = consistency(denoise, own.noise_schedule)
    x = seeded_noise(5)() * spec.initial_scale(schedule, sigmas[0])
    ours = last_x(spec(denoise, x, sigmas, noise=seeded_noise(), eta=0.0 if name == "ddim" else None))
    assert difference(ours, theirs) < 1e-4
