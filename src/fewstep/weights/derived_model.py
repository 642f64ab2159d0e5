"""Models that come with fewstep as the difference to another one: a LoRA of its UNet, with its biases and norms."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.models.unet import UNet
from fewstep.models.zoo import Entry
from fewstep.weights.fetch import ASSETS
from fewstep.weights.model import LoadedModel

FILE, VECTORS = "lora.safetensors", "vectors.safetensors"
_UP, _DOWN = ".lora_B.weight", ".lora_A.weight"


def vectors(unet: UNet) -> dict[str, Tensor]:
    """The biases and norms of a UNet, which no LoRA changes, by their names."""
    return {name: value for name, value in unet.state_dict().items() if value.ndim == 1}


@torch.no_grad()
def derived_model(model: LoadedModel, known: Entry) -> LoadedModel:
    """`model`, the base of `known`, with its LoRA (of alpha = rank) merged, its name, licence and defaults."""
    own, factors = model.networks.unet.state_dict(), load_file(ASSETS / known.name / FILE)
    for name in factors:
        if name.endswith(_UP):
            up, down = factors[name].float().flatten(1), factors[name.removesuffix(_UP) + _DOWN].float().flatten(1)
            weight = own[name.removeprefix("unet.").removesuffix(_UP) + ".weight"]
            weight.copy_(weight.float() + (up @ down).to(weight.device).view(weight.shape))
    for name, vector in load_file(ASSETS / known.name / VECTORS).items():
        own[name].copy_(vector)
    defaults = known.defaults or model.spec.defaults
    scheduler = model.spec.scheduler.sampled_by(defaults.sampler, defaults.schedule)
    return model.with_spec(name=known.name, licence=known.licence, defaults=defaults, scheduler=scheduler)
