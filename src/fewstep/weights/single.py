"""Original single files: recognising the model in one from its names and shapes, and loading it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path

import torch

from fewstep.diffusion.denoiser import Prediction
from fewstep.errors import CheckpointError, InputError
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import AutoencoderConfig, Stage, TextConfig, UNetConfig
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import CATALOGUE, Family
from fewstep.text.tokenizer import Tokenizer
from fewstep.weights.build import built
from fewstep.weights.fetch import cached_folder
from fewstep.weights.files import Shape, TensorFile
from fewstep.weights.fill import Filling, fill
from fewstep.weights.layouts import (
    AUTOENCODER_PREFIX,
    TEXT_PREFIXES,
    UNET_PREFIX,
    autoencoder_places,
    text_places,
    unet_places,
)
from fewstep.weights.parts import Parts, usual_defaults
from fewstep.weights.scheduler import SchedulerConfig, usual_scheduler

Shapes = Mapping[str, Shape]

SOURCES: Mapping[Family, str] = {
    "sd1": "sd-v1-4",
    "sd2": "sd-v2-1",
    "sdxl": "sdxl-base",
    "sdxl-refiner": "sdxl-refiner",
}
"""The entry of the catalogue whose tokenizers serve each family's single files."""

DROPPED = (
    r"betas|alphas_cumprod(_prev)?|sqrt_\w*alphas_cumprod|log_one_minus_alphas_cumprod|posterior_\w+|lvlb_weights",
    r"logvar|scale_factor|v_pred|ztsnr|denoiser\.sigmas|model_ema\..*|first_stage_model\.(loss|model_ema)\..*",
    r".*embeddings\.position_ids|(cond_stage_model|conditioner\.embedders\.[01])\.(model\.)?(logit_scale|attn_mask)",
    r"cond_stage_model\.model\.(text_projection|transformer\.resblocks\.23\..*)",
)
"""What single files hold besides the networks: training constants, averages, CLIP's unused ends.

SD 2 reads its text tower before the last of 24 layers, so that layer, the projection and the like go unused."""
_DROPPED = re.compile("|".join(DROPPED))


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a single file holds: its family and the shapes of its networks."""

    family: Family
    unet: UNetConfig
    autoencoder: AutoencoderConfig
    texts: tuple[TextConfig, ...]


def recognise(file: TensorFile) -> Contents:
    """The family and the configs, from names and shapes alone; CheckpointError says what the file is instead."""
    shapes = file.shapes
    family = _family(file)
    try:
        texts = tuple(_text_config(shapes, prefix) for prefix in TEXT_PREFIXES[family])
        return Contents(
            family=family,
            unet=_unet_config(shapes, sd1=family == "sd1"),
            autoencoder=_autoencoder_config(shapes, sdxl=family.startswith("sdxl")),
            texts=texts,
        )
    except (LookupError, ValueError) as error:
        raise CheckpointError(f"{file.path} looks like {family}, but lacks or misshapes {error}") from error


def load_single_file(
    file: TensorFile,
    *,
    dtype: torch.dtype,
    device: torch.device,
    prediction: Prediction | None = None,
    tokenizer: Path | None = None,
) -> Parts:
    """The parts of an original single file; raises as `load_parts` does."""
    contents = recognise(file)
    family, path = contents.family, file.path
    scheduler = _scheduler(file, family, prediction)
    tokenizers = _tokenizers(path, family, tokenizer)
    unet = built(UNet, contents.unet, path)
    autoencoder = built(AutoencoderKL, contents.autoencoder, path)
    towers = tuple(built(TextEncoder, config, path) for config in contents.texts)
    places = [
        unet_places(unet.state_dict(), unet.config),
        autoencoder_places(autoencoder.state_dict(), autoencoder.config),
    ]
    for prefix, tower in zip(TEXT_PREFIXES[family], towers, strict=True):
        places.append(text_places(tower.state_dict(), tower.config, prefix))
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    fillings = [
        Filling(name=name, module=module, file=file, places=place)
        for name, module, place in zip(names, (unet, autoencoder, *towers), places, strict=False)
    ]
    fill(fillings, ignored=is_dropped, dtype=dtype, device=device)
    side = (
        512
        if family == "sd1" or (family == "sd2" and scheduler.prediction == "epsilon")
        else 768
        if family == "sd2"
        else 1024
    )
    return Parts(
        name=path.stem,
        family=family,
        unet=unet,
        autoencoder=autoencoder,
        text_encoders=towers,
        tokenizers=tokenizers,
        scheduler=scheduler,
        defaults=usual_defaults(family, scheduler, (side, side)),
        licence=file.notes.get("modelspec.license", "unknown"),
        force_zeros_for_empty_prompt=family == "sdxl",
        requires_aesthetics_score=family == "sdxl-refiner",
    )


def is_dropped(key: str) -> bool:
    """Whether a name in a single file is known and left out on purpose: see `DROPPED`."""
    return _DROPPED.fullmatch(key) is not None


def _family(file: TensorFile) -> Family:
    """By where the text towers lie."""
    shapes = file.shapes
    if f"{UNET_PREFIX}input_blocks.0.0.weight" in shapes:
        for family in ("sdxl", "sd1", "sd2", "sdxl-refiner"):  # sdxl's second prefix is looked at first
            prefix = TEXT_PREFIXES[family][-1]
            if any(key.startswith(prefix) for key in shapes):
                return family
    some = ", ".join(sorted(shapes)[:3])
    hint = next((what for mark, what in _OTHERS.items() if any(mark in key for key in shapes)), "not a whole model")
    raise CheckpointError(f"{file.path} is {hint}; expected an SD 1, SD 2 or SDXL single file. It holds {some}, ...")


_OTHERS = {
    "lora_": "a LoRA",
    "control_model.": "a ControlNet",
    "input_hint_block": "a ControlNet",
    "double_blocks.": "a model of the Flux family",
    "joint_blocks.": "a Stable Diffusion 3 model",
    "down_blocks.": "one part of a diffusers folder (give the folder)",
    UNET_PREFIX: "a UNet without its text towers",
    AUTOENCODER_PREFIX: "an autoencoder alone",
}


def _numbers(shapes: Shapes, template: str) -> int:
    """How many of the names that `template` gives for 0, 1, 2, ... are there without a gap."""
    return len(list(takewhile(lambda i: template.format(i) in shapes, count())))


def _unet_config(shapes: Shapes, *, sd1: bool) -> UNetConfig:
    def depth(block: str) -> int:
        return _numbers(shapes, f"{UNET_PREFIX}{block}.transformer_blocks.{{}}.norm1.weight")

    levels: list[list[tuple[int, int]]] = [[]]
    for n in count(1):
        block = f"{UNET_PREFIX}input_blocks.{n}.0."
        if f"{block}op.weight" in shapes:
            levels.append([])
        elif f"{block}in_layers.2.weight" in shapes:
            levels[-1].append((shapes[f"{block}in_layers.2.weight"][0], depth(f"input_blocks.{n}.1")))
        else:
            break
    stages = tuple(
        Stage(
            channels=level[0][0], resnets=len(level), depth=level[0][1], heads=8 if sd1 else max(1, level[0][0] // 64)
        )
        for level in levels
    )
    middle = f"{UNET_PREFIX}middle_block.1."
    added = shapes.get(f"{UNET_PREFIX}label_emb.0.0.weight")
    return UNetConfig(
        stages=stages,
        context=shapes[f"{middle}transformer_blocks.0.attn2.to_k.weight"][1],
        in_channels=shapes[f"{UNET_PREFIX}input_blocks.0.0.weight"][1],
        out_channels=shapes[f"{UNET_PREFIX}out.2.weight"][0],
        mid_depth=depth("middle_block.1"),
        linear_projection=len(shapes[f"{middle}proj_in.weight"]) == 2,
        addition=added[1] if added else None,
    )


def _autoencoder_config(shapes: Shapes, *, sdxl: bool) -> AutoencoderConfig:
    down = f"{AUTOENCODER_PREFIX}encoder.down."
    levels = _numbers(shapes, f"{down}{{}}.block.0.conv1.weight")
    return AutoencoderConfig(
        channels=tuple(shapes[f"{down}{i}.block.0.conv1.weight"][0] for i in range(levels)),
        resnets=_numbers(shapes, f"{down}0.block.{{}}.conv1.weight"),
        latent_channels=shapes[f"{AUTOENCODER_PREFIX}post_quant_conv.weight"][0],
        scaling_factor=0.13025 if sdxl else 0.18215,
        force_upcast=sdxl,
    )


def _text_config(shapes: Shapes, prefix: str) -> TextConfig:
    if prefix.endswith("transformer."):
        names = ("text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight")
        layer, inner = "text_model.encoder.layers.{}.mlp.fc1.bias", "text_model.encoder.layers.0.mlp.fc1.weight"
    else:
        names = ("token_embedding.weight", "positional_embedding")
        layer, inner = "transformer.resblocks.{}.mlp.c_fc.bias", "transformer.resblocks.0.mlp.c_fc.weight"
    vocabulary, width = shapes[prefix + names[0]]
    layers = _numbers(shapes, prefix + layer)
    projection = shapes.get(f"{prefix}text_projection") if prefix.startswith("conditioner.") else None
    return TextConfig(
        vocabulary=vocabulary,
        window=shapes[prefix + names[1]][0],
        width=width,
        layers=23 if prefix == TEXT_PREFIXES["sd2"][0] and layers == 24 else layers,
        heads=max(1, width // 64),
        inner=shapes[prefix + inner][0],
        activation="quick_gelu" if prefix.endswith("transformer.") else "gelu",
        projection=projection[1] if projection else None,
        eos=vocabulary - 1,
    )


def _scheduler(file: TensorFile, family: Family, prediction: Prediction | None) -> SchedulerConfig:
    """The family's usual one, with the prediction that the caller or the file names."""
    said = file.notes.get("modelspec.prediction_type", "")
    if "v_pred" in file.shapes or said.startswith("v"):
        found: Prediction | None = "v_prediction"
    elif said.startswith("eps") or family != "sd2":
        found = "epsilon"
    else:
        steps = file.notes.get("global_step")
        found = (
            None if steps is None else "epsilon" if steps == "875000" else "v_prediction"
        )  # the first was SD 2's base
    if (prediction or found) is None:
        raise InputError(
            f"{file.path} is an SD 2 model, and its file does not say what it predicts; "
            "pass prediction='v_prediction' (SD 2.1 for 768 pixels) or 'epsilon' (the base for 512 pixels, SD-Turbo)"
        )
    scheduler = usual_scheduler(family, prediction or found or "epsilon")
    return replace(scheduler, zero_terminal_snr="ztsnr" in file.shapes)


def _tokenizers(path: Path, family: Family, folder: Path | None) -> tuple[Tokenizer, ...]:
    """From the folder given (a tokenizer's, or one with `tokenizer` folders in it), else from the hub's cache."""
    source = CATALOGUE[SOURCES[family]].source or ""
    names = {"sdxl": ("tokenizer", "tokenizer_2"), "sdxl-refiner": ("tokenizer_2",)}.get(family, ("tokenizer",))
    root = folder or cached_folder(source)
    found = [root / name for name in names if root and (root / name).is_dir()]
    if len(found) < len(names) and root and (root / "vocab.json").is_file() and len(names) == 1:
        found = [root]
    if len(found) < len(names):
        raise InputError(
            f"{path} has no tokenizer in it; pass tokenizer=, a folder with {' and '.join(names)} as in {source}"
        )
    return tuple(Tokenizer.from_folder(place) for place in found)
