"""What the layers of a model are called in the files of different trainers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from fewstep.adapters.lora import layers_of, networks
from fewstep.weights.layouts import UNET_PREFIX, single_places
from fewstep.weights.model import Loaded, family_of

_DOTTED = {  # diffusers and PEFT, then ComfyUI
    "unet": ("unet.", "diffusion_model."),
    "text_encoder": ("text_encoder.", "text_encoders.clip_l.transformer."),
    "text_encoder_2": ("text_encoder_2.", "text_encoders.clip_g.transformer."),
}
_UNDERSCORED = {  # kohya: underscores for dots
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}


def layer_names(model: Loaded) -> dict[str, str]:
    """From every name that a file may have for a layer of the model to the layer's name in a `Lora`."""
    originals = _originals(model)
    lone_tower = len(model.networks.text_encoders) == 1
    names: dict[str, str] = {}
    for ours in layers_of(networks(model)):
        network, _, layer = ours.partition(".")
        dotted = (*_DOTTED[network], *([""] if network == "unet" or lone_tower else []))
        for variant in {layer, *_variants(layer), originals.get(layer, layer)}:
            names |= {prefix + variant: ours for prefix in dotted}
            names |= {prefix + variant.replace(".", "_"): ours for prefix in _UNDERSCORED[network]}
    return names


def kohya_names(names: Iterable[str]) -> dict[str, str]:
    """From the names of a LoRA's layers to those that kohya's trainer would write."""
    known = list(names)
    tower = "lora_te1_" if any(name.startswith("text_encoder_2.") for name in known) else "lora_te_"
    prefixes = {"unet": "lora_unet_", "text_encoder": tower, "text_encoder_2": "lora_te2_"}
    parts = ((name, *name.split(".", 1)) for name in known)
    return {name: prefixes[network] + layer.replace(".", "_") for name, network, layer in parts}


def _variants(layer: str) -> Iterator[str]:
    """Names of older and newer versions of diffusers and transformers."""
    if layer.endswith(".to_out.0"):
        yield layer.removesuffix(".0")
    bare = layer.removeprefix("text_model.")
    if bare != layer:
        for name in (layer, bare):
            yield from (name, re.sub(r"\b(q|k|v|out)_proj$", r"to_\1", name))


def _originals(model: Loaded) -> dict[str, str]:
    """From the UNet's names to those of the original single files, which kohya's trainer gives to SDXL."""
    family = family_of(model.spec.unet)
    (_, places), *_ = single_places(family, model.networks)
    return {
        name.removesuffix(".weight"): place.key.removeprefix(UNET_PREFIX).removesuffix(".weight")
        for name, place in places.items()
    }
