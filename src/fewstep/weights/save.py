"""Saving a model: as a diffusers folder that diffusers reads, or as an original single file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.errors import InputError
from fewstep.models.zoo import Family
from fewstep.text.tokenizer import Tokenizer
from fewstep.weights.files import TensorFile
from fewstep.weights.layouts import gathered, single_places
from fewstep.weights.parts import Parts, family_of
from fewstep.weights.single import Contents, recognise

_PIPELINES: Mapping[Family, str] = {
    "sd1": "StableDiffusion{}Pipeline",
    "sd2": "StableDiffusion{}Pipeline",
    "sdxl": "StableDiffusionXL{}Pipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
}
_ABSENT = [None, None]


def save_parts(parts: Parts, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a diffusers folder, with weights in `dtype` or as they are.

    The folder appears whole or not at all. An older model folder of that name is replaced; InputError if something
    else is there.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "model_index.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not a model folder; name another one")
    partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{what}") for what in ("partial", "old"))
    try:
        partial.mkdir(parents=True)
        _write_folder(parts, partial, dtype)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def save_single_file(parts: Parts, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write one .safetensors file in the original layout of the family.

    InputError for shapes that the layout cannot tell: it names no numbers of heads, for one.
    """
    path, family, tensors = Path(path), family_of(parts.unet.config), dict[str, Tensor]()
    for _, network, places in single_places(family, parts.unet, parts.autoencoder, parts.text_encoders):
        tensors |= gathered(places, network.state_dict())
    _check_recognised(parts, path, tensors)
    notes = {"modelspec.prediction_type": parts.scheduler.prediction, "modelspec.license": parts.licence}
    _write_tensors(tensors, path, dtype, notes)


def _write_folder(parts: Parts, folder: Path, dtype: torch.dtype | None) -> None:
    towers = _tower_names(parts)
    width, factor = parts.defaults.width, parts.autoencoder.config.factor
    configs = {
        "unet": (parts.unet, parts.unet.config.to_diffusers(width // factor)),
        "vae": (parts.autoencoder, parts.autoencoder.config.to_diffusers(width)),
        **{
            name: (tower, tower.config.to_transformers())
            for name, tower in zip(towers, parts.text_encoders, strict=True)
        },
    }
    for name, (network, config) in configs.items():
        stem = "model" if name in towers else "diffusion_pytorch_model"
        (folder / name).mkdir()
        _write_json(folder / name / "config.json", config)
        _write_tensors(network.state_dict(), folder / name / f"{stem}.safetensors", dtype)
    for name, tokenizer in zip(towers, parts.tokenizers, strict=True):
        tokenizer.save(folder / name.replace("text_encoder", "tokenizer"))
    (folder / "scheduler").mkdir()
    scheduler = parts.scheduler.to_diffusers()
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(folder / "model_index.json", _index(parts, towers, scheduler["_class_name"]))


def _index(parts: Parts, towers: tuple[str, ...], scheduler: str) -> dict[str, Any]:
    """The model_index.json: which class of which library reads each part."""
    family = family_of(parts.unet.config)
    index: dict[str, Any] = {
        "_class_name": _PIPELINES[family].format("Inpaint" if parts.unet.config.in_channels == 9 else ""),
        "_diffusers_version": "0.35.0",
        "_fewstep": {"name": parts.name, "licence": parts.licence, "defaults": asdict(parts.defaults)},
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler],
        "feature_extractor": _ABSENT,
    }
    if family in ("sdxl", "sdxl-refiner"):
        index |= {"image_encoder": _ABSENT, "text_encoder": _ABSENT, "tokenizer": _ABSENT}
        index["force_zeros_for_empty_prompt"] = parts.force_zeros_for_empty_prompt
        if family == "sdxl-refiner":
            index["requires_aesthetics_score"] = parts.requires_aesthetics_score
    else:
        index |= {"safety_checker": _ABSENT, "requires_safety_checker": False}
    for name, tower, tokenizer in zip(towers, parts.text_encoders, parts.tokenizers, strict=True):
        index[name] = ["transformers", tower.config.to_transformers()["architectures"][0]]
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", _tokenizer_class(tokenizer)]
    return index


def _tower_names(parts: Parts) -> tuple[str, ...]:
    """Of the text towers' folders: the refiner's one stands second."""
    names = ("text_encoder", "text_encoder_2")
    return names[1:] if family_of(parts.unet.config) == "sdxl-refiner" else names[: len(parts.text_encoders)]


def _tokenizer_class(tokenizer: Tokenizer) -> str:
    return "CLIPTokenizer" if tokenizer.unk is None else "PreTrainedTokenizerFast"


def _check_recognised(parts: Parts, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """That a reader of the single file will build the very same networks."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = dict.fromkeys(shapes, torch.float32)
    read = recognise(TensorFile(path=path, shapes=shapes, dtypes=dtypes, read=lambda name, _: tensors[name]))
    mine = Contents(
        family=family_of(parts.unet.config),
        unet=parts.unet.config,
        autoencoder=parts.autoencoder.config,
        texts=tuple(tower.config for tower in parts.text_encoders),
    )
    if read != mine:
        raise InputError(f"{path}: the single-file layout would read {read}, but the model is {mine}; save a folder")


def _write_tensors(
    tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None, notes: Mapping[str, str] | None = None
) -> None:
    """A .safetensors file that appears whole or not at all."""
    ready = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # save_file gives the file to its owner alone
        save_file(ready, partial, metadata={"format": "pt", **(notes or {})})
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
