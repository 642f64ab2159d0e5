"""A whole run as one function of tensors, from token ids to 8-bit pictures, which an engine may record and replay."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion.samplers import SAMPLERS
from fewstep.engines.engine import NotRecordable, Recorder
from fewstep.images import to_uint8
from fewstep.pipeline.conditioning import PromptInputs
from fewstep.pipeline.denoising import Model, model_denoiser, sampled
from fewstep.pipeline.request import Request

MOST_PREDICTIONS = 16
"""Calls of the UNet above which a run is not recorded: the host is hidden behind them, and recording costs as many."""


class Drawn(NamedTuple):
    """`pictures` (B, H, W, 3) uint8, `latents` (B, 4, h, w), and whether text, latents and pixels are finite: (3,)."""

    pictures: Tensor
    latents: Tensor
    finite: Tensor


def launch_recorded(
    engine: Recorder, model: Model, request: Request, sigmas: tuple[float, ...], inputs: PromptInputs, unit: Tensor
) -> Callable[[], Drawn] | None:
    """Launch the recording of such a run; the function that waits for what it draws.

    `unit` (B, 4, h, w) is noise of unit variance. None where `engine`, the model's, has no recording (yet): see
    `Recorder.record`.
    """
    sampler = SAMPLERS[request.sampler]
    if (len(sigmas) - 1) * sampler.evaluations > MOST_PREDICTIONS or model.spec.unet.in_channels != 4:
        return None
    scale = sampler.initial_scale(request.schedule, sigmas[0])

    def function(unit: Tensor, *tensors: Tensor | None) -> Drawn:
        conditions, x = inputs.conditions(engine, tensors), unit * scale
        denoise = model_denoiser(model, conditions, request)
        for step in sampled(model, denoise, x, sigmas, request, _no_noise):
            x = step.x
        latents = x / sqrt(1 + sigmas[-1] ** 2)
        pixels = engine.decode(latents)
        finite = torch.stack([each.isfinite().all() for each in (conditions[0].context, latents, pixels)])
        return Drawn(to_uint8(pixels), latents, finite)

    key = (request.sampler, request.eta, request.guidance, sigmas, scale, inputs.blank, model.spec.scheduler)
    wait = engine.record(key, function, (unit, *inputs.tensors))
    return None if wait is None else lambda: Drawn(*wait())


def _no_noise() -> Tensor:
    raise NotRecordable("the sampler draws fresh noise, which comes from the host")
