"""A model's denoiser under a job's conditions, and the steps that a sampler takes with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser, consistency, denoiser
from fewstep.diffusion.guidance import guided
from fewstep.diffusion.samplers import SAMPLERS
from fewstep.diffusion.step import Noise, Step
from fewstep.engines.engine import Conditioning, Engine, stacked
from fewstep.pipeline.conditioning import Conditions
from fewstep.pipeline.request import Job
from fewstep.weights.parts import Parts


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model's parts and the engine that runs them."""

    parts: Parts
    engine: Engine


def model_denoiser(model: Model, conditions: Conditions, job: Job) -> Denoiser:
    """The model's guided denoiser under these conditions."""
    (with_prompt, without), scheduler, engine = conditions, model.parts.scheduler, model.engine

    def bound(conditioning: Conditioning) -> Denoiser:
        return denoiser(lambda x, t: engine.predict(x, t, conditioning), scheduler.noise_schedule, scheduler.prediction)

    cond = bound(with_prompt)
    if without is None:
        return cond
    return guided(cond, bound(stacked(without, with_prompt)), job.guidance, scheduler.prediction)


def sampled(
    model: Model, denoise: Denoiser, x: Tensor, sigmas: tuple[float, ...], job: Job, noise: Noise
) -> Iterator[Step]:
    """The steps of the job's sampler from `x` at level `sigmas[0]`."""
    sampler = SAMPLERS[job.sampler]
    if sampler.consistency:
        denoise = consistency(denoise, model.parts.scheduler.noise_schedule)
    return sampler(denoise, x, sigmas, noise=noise, eta=job.eta)
