"""What a checkpoint is made of, once loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
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


def family_of(unet: UNetConfig) -> Family:
    """The family by the UNet's conditioning and its kind of projections; SD 1 and 2 differ in nothing else."""
    if unet.addition:
        return "sdxl" if unet.size_numbers == 6 else "sdxl-refiner"
    return "sd2" if unet.linear_projection else "sd1"


def usual_defaults(
    family: Family,
    scheduler: SchedulerConfig,
    size: tuple[int, int],
    *,
    noted: Mapping[str, Any] | None = None,
    known: Entry | None = None,
) -> Defaults:
    """What diffusers' pipelines do for `family` when they are not told; `size` is width, height in pixels.

    Of the published models the turbo ones alone walk Euler steps over trailing levels: they draw in one, unguided.
    Before that go the defaults `noted` in the model's folder, and the steps, guidance and size of the entry `known`.
    CheckpointError for a note of another name or kind.
    """
    turbo = scheduler.spacing == "trailing" and scheduler.sampler in ("euler", "euler_ancestral")
    guidance_scale = 5.0 if family in ("sdxl", "sdxl-refiner") else 7.5
    usual: dict[str, Any] = {
        "steps": 1 if turbo else 50,
        "guidance_scale": 0.0 if turbo else guidance_scale,
        "sampler": scheduler.sampler,
        "schedule": scheduler.spacing,
        "width": size[0],
        "height": size[1],
    }
    for name, value in (noted or {}).items():
        if name not in usual or isinstance(value, str) != isinstance(usual[name], str):
            raise CheckpointError(f"model_index.json: the default {name} = {value!r} cannot be used")
    entry = asdict(known.defaults) if known is not None and known.defaults is not None else {}
    mine = {name: value for name, value in entry.items() if name not in ("sampler", "schedule")}
    return Defaults(**(usual | dict(noted or {}) | mine))
