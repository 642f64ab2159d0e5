"""The difference of two models as a LoRA: how a fine-tuned or distilled edition is shipped beside its base."""

from __future__ import annotations

from math import sqrt

import torch

from fewstep.adapters.lora import Factors, Lora, layers_of, networks
from fewstep.errors import InputError
from fewstep.weights.parts import Parts


@torch.no_grad()
def extracted_lora(base: Parts, tuned: Parts, *, rank: int, name: str = "lora") -> tuple[Lora, float]:
    """The LoRA of at most `rank` that brings `base` nearest to `tuned`, and how far apart they stay.

    Nearest in squared error, layer by layer, by singular values. The distance is relative to that without the LoRA;
    biases and norms, which a LoRA cannot change, are not counted. InputError for models of other shapes.
    """
    if rank < 1:
        raise InputError(f"the rank is {rank}; it must be 1 or more")
    ours, theirs = layers_of(networks(base)), layers_of(networks(tuned))
    if {n: layer.weight.shape for n, layer in ours.items()} != {n: layer.weight.shape for n, layer in theirs.items()}:
        raise InputError(f"{base.name} and {tuned.name} have other layers; a LoRA is the difference of two alike")
    layers, left, whole = {}, 0.0, 0.0
    for layer, module in ours.items():
        change = (theirs[layer].weight.float() - module.weight.float()).flatten(1)
        if not change.any():
            continue
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        kept, shape = min(rank, len(s)), module.weight.shape
        down = (s[:kept].sqrt()[:, None] * v[:kept]).reshape(kept, *shape[1:])
        up = (u[:, :kept] * s[:kept].sqrt()).reshape(shape[0], kept, *[1] * (len(shape) - 2))
        layers[layer] = Factors(down=down.contiguous(), up=up.contiguous(), alpha=float(kept))
        left, whole = left + float(s[kept:].square().sum()), whole + float(s.square().sum())
    return Lora(name=name, layers=layers), sqrt(left / whole) if whole else 0.0
