"""What a checkpoint is made of, once loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from fewstep.diffusion.samplers import SAMPLERS
from fewstep.diffusion.schedule import SCHEDULES
from fewstep.errors import CheckpointError, quoted
from fewstep.locks import WeightsLock
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import UNetConfig
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.tiny_autoencoder import TinyAutoencoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import Defaults, Entry, Family
from fewstep.text.tokenizer import Tokenizer
from fewstep.weights.scheduler import SchedulerConfig

_RANGES = {"steps": (1, 1000), "guidance_scale": (0, 100), "width": (64, 8192), "height": (64, 8192)}
_NAMES = {"sampler": tuple(SAMPLERS), "schedule": SCHEDULES}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The networks of one model with what belongs to them; text towers and tokenizers in the same order.

    `name`: the catalogue's, the folder's or the file's. `force_zeros_for_empty_prompt`: as SDXL's base was trained.
    `tiny`: decodes in the autoencoder's place. `lock`: held by engines that compute with the weights, and by whoever
    changes them.
    """

    name: str
    family: Family
    unet: UNet
    autoencoder: AutoencoderKL
    text_encoders: tuple[TextEncoder, ...]
    tokenizers: tuple[Tokenizer, ...]
    scheduler: SchedulerConfig
    defaults: Defaults
    licence: str
    force_zeros_for_empty_prompt: bool = False
    tiny: TinyAutoencoder | None = None
    lock: WeightsLock = field(default_factory=WeightsLock, repr=False, compare=False)


def family_of(unet: UNetConfig) -> Family:
    """The family by the UNet's conditioning and its kind of projections; SD 1 and 2 differ in nothing else."""
    if unet.addition:
        return "sdxl" if unet.size_numbers == 6 else "sdxl-refiner"
    return "sd2" if unet.linear_projection else "sd1"


def usual_defaults(
    family: Family, scheduler: SchedulerConfig, size: tuple[int, int], noted: Mapping[str, Any] | None = None
) -> Defaults:
    """What diffusers' pipelines do for `family` when they are not told; `size` is width, height in pixels.

    Of the published models the turbo ones alone walk Euler steps over trailing levels: they draw in one, unguided.
    Before that go the defaults `noted` in the model's folder; CheckpointError for a note of another name or kind.
    """
    turbo = scheduler.spacing == "trailing" and scheduler.sampler in ("euler", "euler_ancestral")
    usual = Defaults(
        steps=1 if turbo else 50,
        guidance_scale=0.0 if turbo else 5.0 if family in ("sdxl", "sdxl-refiner") else 7.5,
        sampler=scheduler.sampler,
        width=size[0],
        height=size[1],
    )
    noted = {name: value for name, value in (noted or {}).items() if value is not None}
    for name, value in noted.items():
        low, high = _RANGES.get(name, (inf, -inf))
        number = type(value) is int or (type(value) is float and name == "guidance_scale")
        if not (low <= value <= high if number else value in _NAMES.get(name, ())):
            raise CheckpointError(f"model_index.json: the default {quoted(name)} = {quoted(value)} cannot be used")
    return replace(usual, **noted)


def published(parts: Parts, known: Entry) -> Parts:
    """`parts` under the name, licence, steps, guidance and size of its entry; the sampler is the checkpoint's own."""
    own, defaults = parts.defaults, known.defaults or parts.defaults
    defaults = replace(defaults, sampler=own.sampler, schedule=own.schedule)
    return replace(parts, name=known.name, family=known.family, licence=known.licence, defaults=defaults)
