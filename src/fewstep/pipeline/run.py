"""One task under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import sqrt
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser, consistency, denoiser
from fewstep.diffusion.guidance import guided
from fewstep.diffusion.samplers import SAMPLERS
from fewstep.diffusion.schedule import sigmas_for
from fewstep.diffusion.step import Step
from fewstep.engines.cpu.limits import engine_threads
from fewstep.engines.engine import Conditioning, Engine, stacked
from fewstep.errors import InputError, NotFiniteError
from fewstep.images import to_numpy, to_pil
from fewstep.pipeline.canvas import Canvas, drawn_latents, keeping, latent_mask, masked_channels, rows_of
from fewstep.pipeline.conditioning import Prompted, encode_prompts
from fewstep.pipeline.options import Job, Progress, strength_steps
from fewstep.pipeline.result import Result
from fewstep.rng import SeededNoise
from fewstep.weights.parts import Parts


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model's parts and the engine that runs them."""

    parts: Parts
    engine: Engine


class Run:
    """One call of a task: iterate it for its steps, then take its `result()`. To cancel, stop iterating.

    The rows of a run belong to its pictures alone: neither batch nor order changes them. A `refiner` takes over after
    the fraction `handoff` of the noise levels (SDXL's ensemble of experts).
    """

    def __init__(
        self,
        model: Model,
        job: Job,
        *,
        canvas: Canvas | None = None,
        strength: float = 1.0,
        refiner: Model | None = None,
        handoff: float = 1.0,
        settings: Mapping[str, Any],
    ) -> None:
        self.model, self.job, self.canvas, self.refiner = model, job, canvas, refiner
        self.settings = settings
        self.seconds = dict.fromkeys(("text", "encode", "denoise", "decode"), 0.0)
        self.sampler = SAMPLERS[job.sampler]
        self.sigmas = self._levels(strength)
        scheduler = model.parts.scheduler
        substituted = bool(scheduler.substitution) and job.sampler == scheduler.sampler
        self.notes: tuple[str, ...] = (scheduler.substitution,) if substituted else ()
        factor = model.parts.autoencoder.config.factor
        self.shape = (model.parts.autoencoder.config.latent_channels, job.height // factor, job.width // factor)
        self.noise = SeededNoise(job.seeds, self.shape)
        self._own_steps = len(self) if refiner is None else _handoff_step(self.sigmas, model.parts, handoff)
        self._prompted: Prompted | None = None
        self._latents: Tensor | None = None  # of the finished run

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.sigmas) - 1

    @torch.inference_mode()
    def __iter__(self) -> Iterator[Progress]:
        """The steps, each as it is done."""
        self.noise, self._latents = SeededNoise(self.job.seeds, self.shape), None
        with self._timed("text"):
            prompted = self._prompted = self._checked_prompts(self.model)
        with self._timed("encode"):
            x, denoise, finish = self._start(prompted)
        started = perf_counter()
        for index, step in enumerate(self._steps(x, denoise)):
            x = step.x
            self.seconds["denoise"] += perf_counter() - started
            yield Progress(index=index, total=len(self), sigma=step.sigma, x0=step.x0)
            started = perf_counter()
        _finite(x, "the denoising steps", "a lower guidance_scale, another sampler, or dtype='float32'")
        self._latents = finish(x / sqrt(1 + self.sigmas[-1] ** 2))

    @torch.inference_mode()
    def result(self) -> Result:
        """The pictures; runs the steps first if nobody has. Raises InputError for a run that was left half-way."""
        if self._prompted is None:
            deque(self, maxlen=0)
        latents, prompted = self._latents, self._prompted
        if latents is None or prompted is None:
            raise InputError("this run was left before its last step; iterate it to the end, or start a new one")
        images: dict[str, Any] = {"latents": latents.cpu()}
        if self.job.output != "latent":
            with engine_threads(self.model.engine):
                with self._timed("decode"):
                    pixels = self.model.engine.decode(latents).cpu()
                _finite(pixels, "the decoder", "dtype='float32'")
                as_array = self.job.output == "numpy"
                images = {"array": to_numpy(pixels)} if as_array else {"images": tuple(to_pil(pixels))}
        return Result(
            **images,
            seeds=self.job.seeds,
            tokens_used=prompted.used,
            tokens_dropped=prompted.dropped,
            chunks=prompted.chunks,
            unknown_words=self.model.parts.tokenizers[0].unknown(" ".join(dict.fromkeys(self.job.prompts))),
            notes=self.notes,
            seconds=dict(self.seconds),
            settings=self.settings,
        )

    def _levels(self, strength: float) -> tuple[float, ...]:
        """The levels to visit: the last `int(steps * strength)` steps of the schedule."""
        parts, job = self.model.parts, self.job
        sigmas = sigmas_for(
            job.schedule,
            job.steps,
            parts.scheduler.noise_schedule,
            steps_offset=parts.scheduler.steps_offset,
            final=parts.scheduler.final_for(job.sampler),
            family="sdxl" if parts.unet.config.addition else "sd",
            reading=self.sampler.reading,
        )
        return sigmas[job.steps - strength_steps(job.steps, strength) :]

    def _checked_prompts(self, model: Model) -> Prompted:
        prompted = encode_prompts(model.parts, model.engine, self.job)
        _finite(prompted.cond.context, "the text encoder", "dtype='float32'")
        return prompted

    def _start(self, prompted: Prompted) -> tuple[Tensor, Denoiser, Callable[[Tensor], Tensor]]:
        """The first x, the denoiser, and what to do to the last latents."""
        canvas, top = self.canvas, self.sigmas[0]
        mask = canvas.mask if canvas else None
        inpaints = self.model.parts.unet.config.in_channels == 9
        whole = len(self) == self.job.steps  # nothing of the picture shines through the noise
        known = self._known(canvas) if canvas and not (inpaints and whole) else None
        unit = self._unit_noise()
        x = unit * self.sampler.initial_scale(self.job.schedule, top)
        if known is not None and not (mask is not None and whole):
            x = known + top * unit
        if canvas and inpaints:
            channels = masked_channels(self.model.engine, canvas, len(self.job.seeds), self.noise)
            prompted = prompted.with_channels(channels)
        denoise = model_denoiser(self.model, prompted, self.job)
        if known is None or mask is None or inpaints:
            return x, denoise, lambda latents: latents
        small = latent_mask(mask, known)
        return x, keeping(denoise, known, small, unit, top), lambda latents: torch.lerp(known, latents, small)

    def _known(self, canvas: Canvas) -> Tensor:
        count, engine = len(self.job.seeds), self.model.engine
        if canvas.is_latent:
            return rows_of(canvas.image, count).to(engine.device)
        known = drawn_latents(engine, canvas.image, count, self.noise)
        _finite(known, "the encoder", "dtype='float32'")
        return known

    def _unit_noise(self) -> Tensor:
        given, count = self.job.latents, len(self.job.seeds)
        if given is not None and tuple(given.shape) != (count, *self.shape):
            raise InputError(f"latents have shape {tuple(given.shape)}; {(count, *self.shape)} is needed here")
        unit = self.noise() if given is None else given.float()
        return unit.to(self.model.engine.device)

    def _steps(self, x: Tensor, denoise: Denoiser) -> Iterator[Step]:
        step = None
        for step in islice(self._walk(x, denoise, self.sigmas), self._own_steps):
            yield step
        if self.refiner is None:
            return
        assert step is not None
        denoise = model_denoiser(self.refiner, self._checked_prompts(self.refiner), self.job)
        yield from self._walk(step.x.to(self.refiner.engine.device), denoise, self.sigmas[self._own_steps :])

    def _walk(self, x: Tensor, denoise: Denoiser, sigmas: tuple[float, ...]) -> Iterator[Step]:
        if self.sampler.consistency:
            denoise = consistency(denoise, self.model.parts.scheduler.noise_schedule)
        return self.sampler(denoise, x, sigmas, noise=lambda: self.noise().to(x), eta=self.job.eta)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = perf_counter()
        yield
        self.seconds[stage] += perf_counter() - started


def model_denoiser(model: Model, prompted: Prompted, job: Job) -> Denoiser:
    """The model's guided denoiser under these conditions."""
    scheduler, engine = model.parts.scheduler, model.engine

    def bound(conditioning: Conditioning) -> Denoiser:
        return denoiser(lambda x, t: engine.predict(x, t, conditioning), scheduler.noise_schedule, scheduler.prediction)

    cond = bound(prompted.cond)
    if prompted.uncond is None:
        return cond
    return guided(cond, bound(stacked(prompted.uncond, prompted.cond)), job.guidance, scheduler.prediction)


def _handoff_step(sigmas: tuple[float, ...], parts: Parts, handoff: float) -> int:
    """How many of the steps the first model does before the refiner."""
    steps, schedule = len(sigmas) - 1, parts.scheduler.noise_schedule
    cutoff = round(len(schedule) * (1 - handoff))
    count: int = sum(schedule.sigma_to_t(sigma) > cutoff - 0.5 for sigma in sigmas[:-1])
    if not 0 < count < steps:
        who = "the refiner" if count else "the base model"
        raise InputError(f"handoff {handoff:g} with {steps} steps leaves {who} none; move it or take more steps")
    return count


def _finite(tensor: Tensor, stage: str, remedy: str) -> None:
    if not bool(tensor.isfinite().all()):
        raise NotFiniteError(f"{stage} gave NaN or infinity; try {remedy}")
