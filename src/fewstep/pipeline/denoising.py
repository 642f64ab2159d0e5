"""A model's denoiser for a request, and the steps that a sampler takes with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser, consistency, denoiser
from fewstep.diffusion.guidance import guided
from fewstep.diffusion.samplers import SAMPLERS
from fewstep.diffusion.step import Noise, Step
from fewstep.engines.engine import Conditioning, Engine, stacked
from fewstep.pipeline.conditioning import Conditions
from fewstep.pipeline.request import Request
from fewstep.text.tokenizer import Tokenizer
from fewstep.weights.model import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a run needs of a model: its description, its tokenizers, and the engine that runs it."""

    spec: ModelSpec
    tokenizers: tuple[Tokenizer, ...]
    engine: Engine


def model_denoiser(model: Model, conditions: Conditions, request: Request) -> Denoiser:
    """The model's guided denoiser under these conditions."""
    (with_prompt, without), scheduler, engine = conditions, model.spec.scheduler, model.engine

    def bound(conditioning: Conditioning) -> Denoiser:
        def predict(x: Tensor, t: float) -> Tensor:
            return engine.predict(x, torch.full((len(x),), t, device=x.device), conditioning)

        return denoiser(predict, scheduler.noise_schedule, scheduler.prediction)

    cond = bound(with_prompt)
    if without is None:
        return cond
    return guided(cond, bound(stacked(without, with_prompt)), request.guidance, scheduler.prediction)


def sampled(
    model: Model, denoise: Denoiser, x: Tensor, sigmas: tuple[float, ...], request: Request, noise: Noise
) -> Iterator[Step]:
    """The steps of the request's sampler from `x` at level `sigmas[0]`."""
    sampler = SAMPLERS[request.sampler]
    if sampler.consistency:
        denoise = consistency(denoise, model.spec.scheduler.noise_schedule)
    return sampler(denoise, x, sigmas, noise=noise, eta=request.eta)
