"""Merging LoRAs into a model's weights, where they cost no time, and taking them out again to the last bit."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fewstep.adapters.lora import Factors, Lora, layers_of, networks
from fewstep.adapters.read import read_lora
from fewstep.errors import InputError, NotFiniteError
from fewstep.models.unet import UNet
from fewstep.weights.model import Loaded

Applied = tuple[Lora, float]  # with its scale


@dataclass(kw_only=True)
class _Merged:
    """What is merged into a model now, and the weights that it had before."""

    applied: list[Applied] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict)


_merged: WeakKeyDictionary[UNet, _Merged] = WeakKeyDictionary()
_merging = threading.Lock()
"""One merge at a time: each begins with what the one before has left."""


def add_lora(pipe: Loaded, what: Lora | str | Path, scale: float = 1.0) -> Lora:
    """Merge a LoRA into the weights of `pipe`, beside those that are merged already; the LoRA.

    `what`: a file, a folder that diffusers or PEFT wrote, or a LoRA read or trained before. A negative `scale` turns it
    around. Half-precision weights are computed in float32; the unchanged ones are kept, in as much memory again.
    While other threads draw with the model, it waits for the steps that they are at: those are computed with the
    weights as they were, the next ones with the new weights. Whatever it raises, the model is as it was:
    CheckpointError for a file that does not fit (see `read_lora`), InputError for a LoRA of another model or a scale
    that is no number, NotFiniteError for a scale that is too much for the format of the weights.
    """
    if not math.isfinite(scale):
        raise InputError(f"the scale of a LoRA is {scale}; expected a number, usually from 0 to 1")
    lora = what if isinstance(what, Lora) else read_lora(what, pipe)
    _check_fit(pipe, lora)
    with _merging:
        _set(pipe, [*_applied(pipe), (lora, scale)])
    return lora


@torch.inference_mode(False)  # tensors of that mode have no versions
@torch.no_grad()
def fuse_lora(model: Loaded, lora: Lora) -> None:
    """Merge a LoRA for good: what was before is not kept. Raises as `add_lora` does, and changes nothing then."""
    _check_fit(model, lora)
    layers = layers_of(networks(model))
    weights = {name: _summed(name, layers[name].weight.data, [(lora, 1.0)]) for name in lora.layers}
    with model.networks.lock.changing():
        for name, weight in weights.items():
            _replace(layers[name].weight, weight)


def remove_lora(pipe: Loaded, lora: Lora | None = None) -> None:
    """Take `lora`, or all of them, out of `pipe`; the weights become what they were, to the last bit."""
    with _merging:
        applied = _applied(pipe)
        if lora is not None and not any(each is lora for each, _ in applied):
            merged = ", ".join(each.name for each, _ in applied) or "none"
            raise InputError(f"the LoRA {lora.name} is not merged into {pipe.spec.name}; merged: {merged}")
        _set(pipe, [(each, scale) for each, scale in applied if lora is not None and each is not lora])


def _applied(model: Loaded) -> list[Applied]:
    state = _merged.get(model.networks.unet)
    return state.applied if state else []


def _check_fit(model: Loaded, lora: Lora) -> None:
    sizes = {name: layer.weight.numel() for name, layer in layers_of(networks(model)).items()}
    for name, factors in lora.layers.items():
        if sizes.get(name) != len(factors.up) * factors.down[0].numel():
            raise InputError(
                f"the LoRA {lora.name} changes {name}, which {model.spec.name} has not, or not of this size"
            )


@torch.inference_mode(False)  # tensors of that mode have no versions
@torch.no_grad()
def _set(model: Loaded, applied: list[Applied]) -> None:
    """Make `applied` all that is merged: everything is computed before the first weight changes."""
    state, layers = _merged.setdefault(model.networks.unet, _Merged()), layers_of(networks(model))
    changed = dict.fromkeys(name for lora, _ in applied for name in lora.layers)
    originals = {name: state.originals.get(name, layers[name].weight.data) for name in changed}
    weights = {name: _summed(name, originals[name], applied) for name in changed}
    with model.networks.lock.changing():
        for name in {**state.originals, **changed}:
            _replace(layers[name].weight, weights[name] if name in changed else state.originals[name])
        state.applied, state.originals = applied, originals


def _replace(weight: Tensor, value: Tensor) -> None:
    """Give `weight` another value, and another version: what is made of it is made anew, wherever the value lies."""
    weight.data = value.to(weight.device)
    if not weight.is_inference():
        increment_version(weight)


def _summed(name: str, original: Tensor, applied: Iterable[Applied]) -> Tensor:
    total = original.float()
    for lora, scale in applied:
        if factors := lora.layers.get(name):
            total = total + scale * _moved(factors, original).product().reshape(original.shape)
    weight = total.to(original.dtype)
    if not weight.isfinite().all():
        scales = ", ".join(f"{lora.name} at {scale:g}" for lora, scale in applied)
        raise NotFiniteError(f"{name} with {scales} exceeds what {weight.dtype} holds; lower the scale or use float32")
    return weight


def _moved(factors: Factors, like: Tensor) -> Factors:
    return Factors(down=factors.down.to(like.device), up=factors.up.to(like.device), alpha=factors.alpha)
