"""One task under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from math import sqrt
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.samplers import SAMPLERS
from fewstep.diffusion.schedule import sigmas_for
from fewstep.diffusion.step import Step
from fewstep.engines.cpu.limits import engine_threads
from fewstep.engines.engine import Recorder
from fewstep.errors import InputError
from fewstep.finite import FiniteChecks, require_finite
from fewstep.images import pil_of_uint8, to_numpy, to_uint8
from fewstep.pipeline.conditioning import Conditions, prompt_inputs, with_channels
from fewstep.pipeline.denoising import Model, model_denoiser, sampled
from fewstep.pipeline.init_image import (
    InitImage,
    latent_mask,
    masked_channels,
    masked_denoiser,
    rows_of,
    sample_posterior,
)
from fewstep.pipeline.recorded import Drawn, launch_recorded
from fewstep.pipeline.request import Progress, Request, strength_steps
from fewstep.pipeline.result import Result
from fewstep.rng import SeededNoise
from fewstep.weights.model import ModelSpec

INPAINTING = 9
"""Channels that an inpainting UNet reads: latents, the mask, and the latents of what is outside it."""


class _Start(NamedTuple):
    """The first x, the denoiser, and what the last latents become."""

    x: Tensor
    denoise: Denoiser
    finish: Callable[[Tensor], Tensor] = lambda latents: latents


class Run:
    """One call of a task: iterate it for its steps, then take its `result()`. To cancel, stop iterating.

    The rows of a run belong to its pictures alone: neither batch nor order changes them. A `refiner` takes over after
    the fraction `handoff` of the noise levels (SDXL's ensemble of experts).
    """

    def __init__(
        self,
        model: Model,
        request: Request,
        *,
        init: InitImage | None = None,
        strength: float = 1.0,
        refiner: Model | None = None,
        handoff: float = 1.0,
        settings: Mapping[str, Any],
    ) -> None:
        self.model, self.request, self.init, self.refiner = model, request, init, refiner
        self.settings = settings
        self.seconds = dict.fromkeys(("text", "encode", "denoise", "decode"), 0.0)
        self.sampler = SAMPLERS[request.sampler]
        self.sigmas = self._levels(strength)
        scheduler = model.spec.scheduler
        substituted = bool(scheduler.substitution) and request.sampler == scheduler.sampler
        self.notes: tuple[str, ...] = (scheduler.substitution,) if substituted else ()
        factor = model.spec.autoencoder.factor
        self.shape = (model.spec.autoencoder.latent_channels, request.height // factor, request.width // factor)
        self.noise = SeededNoise(request.seeds, self.shape)
        self._own_steps = len(self) if refiner is None else _handoff_step(self.sigmas, model.spec, handoff)
        self._counts: dict[str, Any] = {}  # of tokens, once a run has begun
        self._latents: Tensor | None = None  # of the finished run
        self._recorded: Callable[[], Drawn] | None = None  # waits for what a recording draws
        self._finite = FiniteChecks()
        self._started = 0.0

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.sigmas) - 1

    @torch.inference_mode()
    def __iter__(self) -> Iterator[Progress]:
        """The steps, each as it is done."""
        self.noise, self._latents, self._recorded = SeededNoise(self.request.seeds, self.shape), None, None
        self._finite = FiniteChecks()
        with self._timed("text"):
            conditions, self._counts = self._conditions(self.model)
        with self._timed("encode"):
            x, denoise, finish = self._start(conditions)
        started = perf_counter()
        for index, step in enumerate(self._steps(x, denoise)):
            x = step.x
            self.seconds["denoise"] += perf_counter() - started
            yield Progress(index=index, total=len(self), sigma=step.sigma, x0=step.x0)
            started = perf_counter()
        self._finite.check("the denoising steps", x)
        self._latents = finish(x / sqrt(1 + self.sigmas[-1] ** 2))

    @torch.inference_mode()
    def launch(self) -> Run:
        """Give a card its work without waiting for it, and come back; `result()` waits. Returns the run itself.

        Where nothing can be done without waiting, the steps are run here.
        """
        if not self._counts:
            self._started = perf_counter()
            self._recorded = self._launch_recorded()
            if self._recorded is None:
                deque(self, maxlen=0)
        return self

    @torch.inference_mode()
    def result(self) -> Result:
        """The pictures; runs the steps first if nobody has. Raises InputError for a run that was left half-way."""
        self.launch()
        unknown = self.model.tokenizers[0].unknown(" ".join(dict.fromkeys(self.request.prompts)))
        images = self._recorded_images() or self._images()  # the first waits
        return Result(
            **images,
            **self._counts,
            seeds=self.request.seeds,
            unknown_words=unknown,
            notes=self.notes,
            seconds=dict(self.seconds),
            settings=self.settings,
        )

    def _launch_recorded(self) -> Callable[[], Drawn] | None:
        """Launch the recording of a run of this kind, if its engine has one."""
        engine = self.model.engine
        if self.init or self.refiner or self.request.output != "pil" or not isinstance(engine, Recorder):
            return None
        inputs, self._counts = prompt_inputs(self.model.spec, self.model.tokenizers, self.request)
        return launch_recorded(engine, self.model, self.request, self.sigmas, inputs, self._unit_noise(move=False))

    def _recorded_images(self) -> dict[str, Any]:
        """What a launched recording has drawn; nothing where there is none, or where its decoder overflowed."""
        if self._recorded is None:
            return {}
        pictures, self._latents, finite = self._recorded()
        require_finite("the text encoder", bool(finite[0]))
        require_finite("the denoising steps", bool(finite[1]))
        if not finite[2]:
            return {}
        self.seconds = {"whole": perf_counter() - self._started}
        return {"images": tuple(pil_of_uint8(pictures)), "latents": self._latents}

    def _images(self) -> dict[str, Any]:
        """The decoded latents of the finished run, as the request wants them."""
        latents, output = self._latents, self.request.output
        if latents is None:
            raise InputError("this run was left before its last step; iterate it to the end, or start a new one")
        if output == "latent":
            self._finite.raise_first()
            return {"latents": latents.cpu()}
        with engine_threads(self.model.engine):
            with self._timed("decode"):
                pixels = self.model.engine.decode(latents)
                self._finite.check("the decoder", pixels)
                pictures = (to_uint8(pixels) if output == "pil" else pixels).cpu()
            self._finite.raise_first()
            drawn = {"images": tuple(pil_of_uint8(pictures))} if output == "pil" else {"array": to_numpy(pictures)}
        return {**drawn, "latents": latents.cpu()}

    def _levels(self, strength: float) -> tuple[float, ...]:
        """The levels to visit: the last `int(steps * strength)` steps of the schedule."""
        spec, request = self.model.spec, self.request
        sigmas = sigmas_for(
            request.schedule,
            request.steps,
            spec.scheduler.noise_schedule,
            steps_offset=spec.scheduler.steps_offset,
            final=spec.scheduler.final_for(request.sampler),
            family="sdxl" if spec.unet.addition else "sd",
            convention=self.sampler.convention,
        )
        return sigmas[request.steps - strength_steps(request.steps, strength) :]

    def _conditions(self, model: Model) -> tuple[Conditions, dict[str, Any]]:
        inputs, counts = prompt_inputs(model.spec, model.tokenizers, self.request)
        conditions = inputs.conditions(model.engine)
        self._finite.check("the text encoder", conditions[0].context)
        return conditions, counts

    def _start(self, conditions: Conditions) -> _Start:
        """The start of a run: its kind follows from the request and from what the UNet reads."""
        if self.init is None:
            unit = self._unit_noise()
            return _Start(self._scaled(unit), model_denoiser(self.model, conditions, self.request))
        if self.model.spec.unet.in_channels == INPAINTING:
            return self._start_inpainting_unet(self.init, conditions)
        denoise = model_denoiser(self.model, conditions, self.request)
        if self.init.mask is None:
            return self._start_image(self.init, denoise)
        return self._start_masked(self.init, self.init.mask, denoise)

    def _start_image(self, init: InitImage, denoise: Denoiser) -> _Start:
        """From the picture under noise."""
        known, unit = self._known(init), self._unit_noise()
        return _Start(known + self.sigmas[0] * unit, denoise)

    def _start_masked(self, init: InitImage, mask: Tensor, denoise: Denoiser) -> _Start:
        """From the picture under noise, or from noise alone where all steps are run; blends it in outside the mask."""
        known, unit, top = self._known(init), self._unit_noise(), self.sigmas[0]
        x = self._scaled(unit) if self._runs_all_steps else known + top * unit
        small = latent_mask(mask, known)
        masked = masked_denoiser(denoise, known, small, unit, top)
        return _Start(x, masked, lambda latents: torch.lerp(known, latents, small))

    def _start_inpainting_unet(self, init: InitImage, conditions: Conditions) -> _Start:
        """As from a picture; the UNet reads the mask and what is outside it."""
        known = None if self._runs_all_steps else self._known(init)
        unit = self._unit_noise()
        x = self._scaled(unit) if known is None else known + self.sigmas[0] * unit
        channels = masked_channels(self.model.engine, init, len(self.request.seeds), self.noise)
        return _Start(x, model_denoiser(self.model, with_channels(conditions, channels), self.request))

    @property
    def _runs_all_steps(self) -> bool:
        return len(self) == self.request.steps

    def _scaled(self, unit: Tensor) -> Tensor:
        """Noise of unit variance at the first level of the run."""
        return unit * self.sampler.initial_scale(self.request.schedule, self.sigmas[0])

    def _known(self, init: InitImage) -> Tensor:
        count, engine = len(self.request.seeds), self.model.engine
        if init.is_latent:
            return rows_of(init.image, count).to(engine.device)
        known = sample_posterior(engine, init.image, count, self.noise)
        self._finite.check("the encoder", known)
        return known

    def _unit_noise(self, *, move: bool = True) -> Tensor:
        """The picture's noise of unit variance, (B, 4, h, w) float32; `move`: to the engine's device."""
        given, count = self.request.latents, len(self.request.seeds)
        if given is not None and tuple(given.shape) != (count, *self.shape):
            raise InputError(f"latents have shape {tuple(given.shape)}; {(count, *self.shape)} is needed here")
        unit = self.noise() if given is None else given.float()
        return unit.to(self.model.engine.device) if move else unit

    def _steps(self, x: Tensor, denoise: Denoiser) -> Iterator[Step]:
        step = None
        for step in islice(self._sampled(x, denoise, self.sigmas), self._own_steps):
            yield step
        if self.refiner is None:
            return
        assert step is not None
        denoise = model_denoiser(self.refiner, self._conditions(self.refiner)[0], self.request)
        yield from self._sampled(step.x.to(self.refiner.engine.device), denoise, self.sigmas[self._own_steps :])

    def _sampled(self, x: Tensor, denoise: Denoiser, sigmas: tuple[float, ...]) -> Iterator[Step]:
        return sampled(self.model, denoise, x, sigmas, self.request, noise=lambda: self.noise().to(x))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = perf_counter()
        yield
        self.seconds[stage] += perf_counter() - started


def _handoff_step(sigmas: tuple[float, ...], spec: ModelSpec, handoff: float) -> int:
    """How many of the steps the first model does before the refiner."""
    steps, schedule = len(sigmas) - 1, spec.scheduler.noise_schedule
    cutoff = round(len(schedule) * (1 - handoff))
    count: int = sum(schedule.sigma_to_t(sigma) > cutoff - 0.5 for sigma in sigmas[:-1])
    if not 0 < count < steps:
        who = "the refiner" if count else "the base model"
        raise InputError(f"handoff {handoff:g} with {steps} steps leaves {who} none; move it or take more steps")
    return count
