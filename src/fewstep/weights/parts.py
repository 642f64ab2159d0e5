"""What a checkpoint is made of, once loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from fewstep.errors import CheckpointError
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import UNetConfig
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import Defaults, Entry, Family
from fewstep.text.tokenizer import Tokenizer
from fewstep.weights.scheduler import SchedulerConfig


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The networks of one model with what belongs to them; text towers and tokenizers in the same order.

    `name`: of the catalogue, or the folder's or file's. `force_zeros_for_empty_prompt`: SDXL's base was trained with
    zeros for no prompt. `requires_aesthetics_score`: the refiner reads a score in place of the target size.
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
    requires_aesthetics_score: bool = False

    @property
    def parameters(self) -> int:
        """How many parameters all the networks have together."""
        networks = (self.unet, self.autoencoder, *self.text_encoders)
        return sum(parameter.numel() for network in networks for parameter in network.parameters())


def family_of(unet: UNetConfig) -> Family:
    """The family by the UNet's conditioning and its kind of projections; SD 1 and 2 differ in nothing else."""
    if unet.addition:
        return "sdxl" if unet.size_numbers == 6 else "sdxl-refiner"
    return "sd2" if unet.linear_projection else "sd1"


def usual_defaults(family: Family, scheduler: SchedulerConfig, size: tuple[int, int]) -> Defaults:
    """What diffusers' pipelines do for `family` when they are not told; `size` is width, height in pixels.

    Of the published models, the turbo ones alone walk Euler steps over trailing levels: they draw in one step.
    """
    width, height = size
    turbo = scheduler.spacing == "trailing" and scheduler.sampler in ("euler", "euler_ancestral")
    usual = 5.0 if family in ("sdxl", "sdxl-refiner") else 7.5
    return Defaults(
        steps=1 if turbo else 50,
        guidance_scale=0.0 if turbo else usual,
        sampler=scheduler.sampler,
        schedule=scheduler.spacing,
        width=width,
        height=height,
    )


def with_entry(defaults: Defaults, known: Entry | None) -> Defaults:
    """`defaults` with the catalogue's steps, guidance and size; sampler and schedule stay the checkpoint's."""
    if known is None or known.defaults is None:
        return defaults
    mine = known.defaults
    return replace(defaults, steps=mine.steps, guidance_scale=mine.guidance_scale, width=mine.width, height=mine.height)


def notes_of(parts: Parts) -> dict[str, Any]:
    """What fewstep adds to a model_index.json, so that a saved model keeps its name, licence and defaults."""
    return {
        "name": parts.name,
        "licence": parts.licence,
        "defaults": asdict(parts.defaults),
    }


def with_notes(defaults: Defaults, notes: Mapping[str, Any]) -> Defaults:
    """`defaults` with those noted in a model_index.json; CheckpointError for one of another type."""
    noted = notes.get("defaults", {})
    for name, value in noted.items():
        mine = getattr(defaults, name, None)
        if mine is None or not isinstance(value, type(mine) if not isinstance(mine, float) else (int, float)):
            raise CheckpointError(f"model_index.json: the default {name} = {value!r} cannot be used")
    return replace(defaults, **noted)
