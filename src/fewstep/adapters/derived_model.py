"""Models of the catalogue that are a LoRA on another one, as they come with fewstep.

Beside the LoRA lie the UNet's biases and norms, which no LoRA changes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.adapters.merge import fuse_lora
from fewstep.adapters.read import read_lora
from fewstep.models.unet import UNet
from fewstep.models.zoo import Entry
from fewstep.weights.fetch import ASSETS
from fewstep.weights.parts import Parts

FILE, VECTORS = "lora.safetensors", "vectors.safetensors"


def vectors(unet: UNet) -> dict[str, Tensor]:
    """The biases and norms of a UNet by their names."""
    return {name: value for name, value in unet.state_dict().items() if value.ndim == 1}


@torch.no_grad()
def derived_model(parts: Parts, known: Entry) -> Parts:
    """`parts`, the base of `known`, with its LoRA merged for good, under its name and with its defaults."""
    fuse_lora(parts, read_lora(ASSETS / known.name / FILE, parts))
    own = parts.unet.state_dict()
    for name, vector in load_file(ASSETS / known.name / VECTORS).items():
        own[name].copy_(vector)
    defaults = known.defaults or parts.defaults
    scheduler = parts.scheduler.sampled_by(defaults.sampler, defaults.schedule)
    return replace(parts, name=known.name, licence=known.licence, defaults=defaults, scheduler=scheduler)
