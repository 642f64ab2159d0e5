"""One task under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from math import sqrt
from time import perf_counter
from typing import Any

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
from fewstep.pipeline.init_image import Canvas, keeping, latent_mask, masked_channels, rows_of, sample_posterior
from fewstep.pipeline.recorded import Drawn, launch_recorded
from fewstep.pipeline.request import Job, Progress, strength_steps
from fewstep.pipeline.result import Result
from fewstep.rng import SeededNoise
from fewstep.weights.parts import Parts


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
        self.noise, self._latents, self._recorded = SeededNoise(self.job.seeds, self.shape), None, None
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
        unknown = self.model.parts.tokenizers[0].unknown(" ".join(dict.fromkeys(self.job.prompts)))
        images = self._recorded_images() or self._images()  # the first waits
        return Result(
            **images,
            **self._counts,
            seeds=self.job.seeds,
            unknown_words=unknown,
            notes=self.notes,
            seconds=dict(self.seconds),
            settings=self.settings,
        )

    def _launch_recorded(self) -> Callable[[], Drawn] | None:
        """Launch the recording of a run of this kind, if its engine has one."""
        engine = self.model.engine
        if self.canvas or self.refiner or self.job.output != "pil" or not isinstance(engine, Recorder):
            return None
        inputs, self._counts = prompt_inputs(self.model.parts, self.job)
        return launch_recorded(engine, self.model, self.job, self.sigmas, inputs, self._unit_noise(move=False))

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
        """The decoded latents of the finished run, as the job wants them."""
        latents, output = self._latents, self.job.output
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

    def _conditions(self, model: Model) -> tuple[Conditions, dict[str, Any]]:
        inputs, counts = prompt_inputs(model.parts, self.job)
        conditions = inputs.conditions(model.engine)
        self._finite.check("the text encoder", conditions[0].context)
        return conditions, counts

    def _start(self, conditions: Conditions) -> tuple[Tensor, Denoiser, Callable[[Tensor], Tensor]]:
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
            conditions = with_channels(conditions, channels)
        denoise = model_denoiser(self.model, conditions, self.job)
        if known is None or mask is None or inpaints:
            return x, denoise, lambda latents: latents
        small = latent_mask(mask, known)
        return x, keeping(denoise, known, small, unit, top), lambda latents: torch.lerp(known, latents, small)

    def _known(self, canvas: Canvas) -> Tensor:
        count, engine = len(self.job.seeds), self.model.engine
        if canvas.is_latent:
            return rows_of(canvas.image, count).to(engine.device)
        known = sample_posterior(engine, canvas.image, count, self.noise)
        self._finite.check("the encoder", known)
        return known

    def _unit_noise(self, *, move: bool = True) -> Tensor:
        """The picture's noise of unit variance, (B, 4, h, w) float32; `move`: to the engine's device."""
        given, count = self.job.latents, len(self.job.seeds)
        if given is not None and tuple(given.shape) != (count, *self.shape):
            raise InputError(f"latents have shape {tuple(given.shape)}; {(count, *self.shape)} is needed here")
        unit = self.noise() if given is None else given.float()
        return unit.to(self.model.engine.device) if move else unit

    def _steps(self, x: Tensor, denoise: Denoiser) -> Iterator[Step]:
        step = None
        for step in islice(self._walk(x, denoise, self.sigmas), self._own_steps):
            yield step
        if self.refiner is None:
            return
        assert step is not None
        denoise = model_denoiser(self.refiner, self._conditions(self.refiner)[0], self.job)
        yield from self._walk(step.x.to(self.refiner.engine.device), denoise, self.sigmas[self._own_steps :])

    def _walk(self, x: Tensor, denoise: Denoiser, sigmas: tuple[float, ...]) -> Iterator[Step]:
        return sampled(self.model, denoise, x, sigmas, self.job, noise=lambda: self.noise().to(x))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = perf_counter()
        yield
        self.seconds[stage] += perf_counter() - started


def _handoff_step(sigmas: tuple[float, ...], parts: Parts, handoff: float) -> int:
    """How many of the steps the first model does before the refiner."""
    steps, schedule = len(sigmas) - 1, parts.scheduler.noise_schedule
    cutoff = round(len(schedule) * (1 - handoff))
    count: int = sum(schedule.sigma_to_t(sigma) > cutoff - 0.5 for sigma in sigmas[:-1])
    if not 0 < count < steps:
        who = "the refiner" if count else "the base model"
        raise InputError(f"handoff {handoff:g} with {steps} steps leaves {who} none; move it or take more steps")
    return count
