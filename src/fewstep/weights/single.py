"""Original single files: what is in one, told from its names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path
from typing import NamedTuple

from fewstep.diffusion.denoiser import Prediction
from fewstep.errors import CheckpointError, InputError, some
from fewstep.formats.tensors import Shape, TensorFile
from fewstep.models.config import AutoencoderConfig, Stage, TextConfig, UNetConfig
from fewstep.models.zoo import CATALOGUE, Family
from fewstep.text.tokenizer import Tokenizer
from fewstep.weights.fetch import cached_folder
from fewstep.weights.layouts import AUTOENCODER_PREFIX, TEXT_PREFIXES, UNET_PREFIX
from fewstep.weights.scheduler import SchedulerConfig, usual_scheduler

Shapes = Mapping[str, Shape]

DROPPED = re.compile(
    r"betas|alphas_cumprod(_prev)?|sqrt_\w*alphas_cumprod|log_one_minus_alphas_cumprod|posterior_\w+|lvlb_weights"
    r"|logvar|scale_factor|v_pred|ztsnr|denoiser\.sigmas|model_ema\..*|first_stage_model\.(loss|model_ema)\..*"
    r"|.*embeddings\.position_ids|(cond_stage_model|conditioner\.embedders\.[01])\.(model\.)?(logit_scale|attn_mask)"
    r"|cond_stage_model\.model\.(text_projection|transformer\.resblocks\.23\..*)"
)
"""What single files hold besides the networks: training constants, averages, CLIP's unused ends.

SD 2 reads its text tower before the last of 24 layers, so that layer and the projection go unused."""

_LORA = "a LoRA; load its model, and add it with fewstep.add_lora or --lora"
_OTHERS = {
    **dict.fromkeys(("lora_", "lora.", ".hada_w1", ".lokr_w1"), _LORA),
    "control": "a ControlNet, which fewstep does not read",
    "double_blocks.": "a model of the Flux family, which fewstep does not read",
    "joint_blocks.": "a Stable Diffusion 3 model, which fewstep does not read",
    "transformer_blocks.0.attn.": "the transformer of a newer family (Stable Diffusion 3, Flux), which is not read",
    "decoder.layers.": "a tiny autoencoder; load a whole model with decoder= its folder",
    UNET_PREFIX: "a UNet without its text towers; give a file with all parts",
    **dict.fromkeys((AUTOENCODER_PREFIX, "decoder.conv_in."), "an autoencoder alone; give a file with all parts"),
    "down_blocks.": "one part of a diffusers folder; give the folder",
    "text_model.": "a text encoder alone; give a file with all parts",
}
_CLIP_NAMES = (
    "text_model.embeddings.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight",
    "text_model.encoder.layers.{}.mlp.fc1.weight",
)
_OPENCLIP_NAMES = ("token_embedding.weight", "positional_embedding", "transformer.resblocks.{}.mlp.c_fc.weight")


class Contents(NamedTuple):
    """What a single file holds: its family and the shapes of its networks."""

    family: Family
    unet: UNetConfig
    autoencoder: AutoencoderConfig
    texts: tuple[TextConfig, ...]


def recognise(file: TensorFile) -> Contents:
    """The family and the configs, from names and shapes alone; CheckpointError says what the file is instead."""
    shapes, family = file.shapes, _family(file)
    try:
        unet = _unet_config(shapes, sd1=family == "sd1")
        autoencoder = _autoencoder_config(shapes, sdxl=family.startswith("sdxl"))
        texts = [_text_config(shapes, at) for at in TEXT_PREFIXES[family]]
        return Contents(  # through the door that checks every number
            family,
            UNetConfig.from_diffusers(unet.to_diffusers(64)),
            AutoencoderConfig.from_diffusers(autoencoder.to_diffusers(64)),
            tuple(TextConfig.from_transformers(text.to_transformers()) for text in texts),
        )
    except CheckpointError as error:
        raise CheckpointError(f"{file.path} looks like {family}, but cannot be: {error}") from error
    except (LookupError, ValueError) as error:
        raise CheckpointError(f"{file.path} looks like {family}, but {error} is missing or misshapen") from error


def _family(file: TensorFile) -> Family:
    """By where the last of the text towers lies."""
    if f"{UNET_PREFIX}input_blocks.0.0.weight" in file.shapes:
        for family, prefixes in TEXT_PREFIXES.items():
            if any(key.startswith(prefixes[-1]) for key in file.shapes):
                return family
    hint = next((what for mark, what in _OTHERS.items() if any(mark in key for key in file.shapes)), "something else")
    raise CheckpointError(f"{file.path} is no SD 1, SD 2 or SDXL single file, but {hint}. It holds {some(file.shapes)}")


def _length(shapes: Shapes, template: str) -> int:
    """How many of the names that `template` gives for 0, 1, 2, ... are there without a gap."""
    return len(list(takewhile(lambda i: template.format(i) in shapes, count())))


def _unet_config(shapes: Shapes, *, sd1: bool) -> UNetConfig:
    def depth(block: str) -> int:
        return _length(shapes, f"{UNET_PREFIX}{block}.1.transformer_blocks.{{}}.norm1.weight")

    levels: list[list[tuple[int, int]]] = [[]]
    for n in count(1):
        block = f"{UNET_PREFIX}input_blocks.{n}.0."
        if f"{block}op.weight" in shapes:
            levels.append([])
        elif f"{block}in_layers.2.weight" in shapes:
            levels[-1].append((shapes[f"{block}in_layers.2.weight"][0], depth(f"input_blocks.{n}")))
        else:
            break
    middle, added = f"{UNET_PREFIX}middle_block.1.", shapes.get(f"{UNET_PREFIX}label_emb.0.0.weight")
    return UNetConfig(
        stages=tuple(
            Stage(channels=c, resnets=len(level), depth=d, heads=8 if sd1 else max(1, c // 64))
            for level in levels
            for c, d in level[:1]
        ),
        context=shapes[f"{middle}transformer_blocks.0.attn2.to_k.weight"][1],
        in_channels=shapes[f"{UNET_PREFIX}input_blocks.0.0.weight"][1],
        out_channels=shapes[f"{UNET_PREFIX}out.2.weight"][0],
        mid_depth=depth("middle_block"),
        linear_projection=len(shapes[f"{middle}proj_in.weight"]) == 2,
        addition=added[1] if added else None,
    )


def _autoencoder_config(shapes: Shapes, *, sdxl: bool) -> AutoencoderConfig:
    down = f"{AUTOENCODER_PREFIX}encoder.down."
    levels = _length(shapes, f"{down}{{}}.block.0.conv1.weight")
    return AutoencoderConfig(
        channels=tuple(shapes[f"{down}{i}.block.0.conv1.weight"][0] for i in range(levels)),
        resnets=_length(shapes, f"{down}0.block.{{}}.conv1.weight"),
        latent_channels=shapes[f"{AUTOENCODER_PREFIX}post_quant_conv.weight"][0],
        scaling_factor=0.13025 if sdxl else 0.18215,
        force_upcast=sdxl,
    )


def _text_config(shapes: Shapes, prefix: str) -> TextConfig:
    clip = prefix.endswith("transformer.")
    tokens, positions, layer = (prefix + name for name in (_CLIP_NAMES if clip else _OPENCLIP_NAMES))
    vocabulary, width = shapes[tokens]
    layers = _length(shapes, layer)
    projection = shapes.get(f"{prefix}text_projection") if prefix.startswith("conditioner.") else None
    return TextConfig(
        vocabulary=vocabulary,
        window=shapes[positions][0],
        width=width,
        layers=23 if prefix in TEXT_PREFIXES["sd2"] and layers == 24 else layers,
        heads=max(1, width // 64),
        inner=shapes[layer.format(0)][0],
        activation="quick_gelu" if clip else "gelu",
        projection=projection[1] if projection else None,
        eos=min(vocabulary, 49408) - 1,  # added tokens come after it
    )


def stated_scheduler(file: TensorFile, family: Family, prediction: Prediction | None) -> SchedulerConfig:
    """The family's usual one, with the prediction that the caller or the file names."""
    stated, steps = file.notes.get("modelspec.prediction_type", ""), file.notes.get("global_step")
    v = "v_pred" in file.shapes or stated.startswith("v")
    epsilon = family != "sd2" or stated.startswith("eps") or steps == "875000"  # of SD 2's base; no other number tells
    if not (prediction or v or epsilon):
        raise InputError(
            f"{file.path} is an SD 2 model and does not say what it predicts; pass prediction='v_prediction' "
            "(SD 2.1 for 768 pixels) or 'epsilon' (the base for 512 pixels, SD-Turbo)"
        )
    chosen = prediction or ("epsilon" if epsilon and not v else "v_prediction")
    return replace(usual_scheduler(family, chosen), zero_terminal_snr="ztsnr" in file.shapes)


def tokenizers_of(path: Path, family: Family, folder: Path | None) -> tuple[Tokenizer, ...]:
    """From `folder` (a tokenizer's, or one with `tokenizer` folders in it), else from the hub's cache."""
    names = {"sdxl": ("tokenizer", "tokenizer_2"), "sdxl-refiner": ("tokenizer_2",)}.get(family, ("tokenizer",))
    sources = [known.source for known in CATALOGUE.values() if known.family == family and known.source]
    roots = [folder] if folder is not None else [cached_folder(source) for source in sources]
    for root in filter(None, roots):
        places = [root / name for name in names]
        if len(names) == 1 and (root / "tokenizer_config.json").is_file():
            places = [root]
        if all(place.is_dir() for place in places):
            return tuple(Tokenizer.from_folder(place) for place in places)
    raise InputError(
        f"{path} has no tokenizer in it; pass tokenizer=, a folder with {' and '.join(names)} as in {sources[0]}"
    )
