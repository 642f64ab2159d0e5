"""What a checkpoint is made of, once loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fewstep.diffusion.samplers import SAMPLERS
from fewstep.diffusion.schedule import SCHEDULES
from fewstep.errors import CheckpointError, quoted
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import UNetConfig
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.tiny_autoencoder import TinyAutoencoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import Defaults, Entry, Family
from fewstep.text.tokenizer import Tokenizer
from fewstep.weights.scheduler import SchedulerConfig


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The networks of one model with what belongs to them; text towers and tokenizers in the same order.

    `name`: the catalogue's, the folder's or the file's. `force_zeros_for_empty_prompt`: as SDXL's base was trained.
    `tiny`: decodes in the autoencoder's place.
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


DEFAULTS: Mapping[str, Collection[str] | float] = {
    "steps": 1000,
    "guidance_scale": 100.0,
    "sampler": SAMPLERS,
    "schedule": SCHEDULES,
    "width": 8192,
    "height": 8192,
}
"""What a model may note as its defaults: the names there are, or the largest number."""


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
    noted = {} if noted is None else noted
    if not isinstance(noted, Mapping):
        raise CheckpointError(f"model_index.json: the defaults are {quoted(noted)}; expected a dictionary")
    noted = {name: value for name, value in noted.items() if value is not None}
    for name, value in noted.items():
        if name not in DEFAULTS or not _is_default(DEFAULTS[name], value):
            raise CheckpointError(f"model_index.json: the default {quoted(name)} = {quoted(value)} cannot be used")
    return replace(usual, **noted)


def _is_default(rule: Collection[str] | float, value: Any) -> bool:
    """Whether `value` is one of some names, or a number from 0 to a largest one; whole where that is whole."""
    if not isinstance(rule, int | float):
        return isinstance(value, str) and value in rule
    return type(value) in (int, type(rule)) and 0 <= value <= rule


def published(parts: Parts, known: Entry) -> Parts:
    """`parts` under the name, licence, steps, guidance and size of its entry; the sampler is the checkpoint's own."""
    own, defaults = parts.defaults, known.defaults or parts.defaults
    defaults = replace(defaults, sampler=own.sampler, schedule=own.schedule)
    return replace(parts, name=known.name, family=known.family, licence=known.licence, defaults=defaults)
