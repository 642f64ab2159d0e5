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
from fewstep.weights.files import TensorFile
from fewstep.weights.layouts import gathered, single_places
from fewstep.weights.parts import Parts, family_of
from fewstep.weights.single import Contents, recognise

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
    for network, places in single_places(family, parts.unet, parts.autoencoder, parts.text_encoders):
        tensors |= gathered(places, network.state_dict())
    _check_recognised(parts, path, tensors)
    notes = {"modelspec.prediction_type": parts.scheduler.prediction, "modelspec.license": parts.licence}
    _write_tensors(tensors, path, dtype, notes)


def _write_folder(parts: Parts, folder: Path, dtype: torch.dtype | None) -> None:
    refiner = family_of(parts.unet.config) == "sdxl-refiner"  # its one text tower stands second
    towers = dict(
        zip(("text_encoder_2",) if refiner else ("text_encoder", "text_encoder_2"), parts.text_encoders, strict=False)
    )
    networks = {"unet": parts.unet, "vae": parts.autoencoder, **towers}
    width, factor = parts.defaults.width, parts.autoencoder.config.factor
    configs = {
        "unet": parts.unet.config.to_diffusers(width // factor),
        "vae": parts.autoencoder.config.to_diffusers(width),
        **{name: tower.config.to_transformers() for name, tower in towers.items()},
    }
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    index = _index(parts) | {name: ["diffusers", kind] for name, kind in classes.items()}
    for name, config in configs.items():
        stem = "model" if name in towers else "diffusion_pytorch_model"
        _write_json(folder / name / "config.json", config)
        _write_tensors(networks[name].state_dict(), folder / name / f"{stem}.safetensors", dtype)
    for name, tokenizer in zip(towers, parts.tokenizers, strict=True):
        words, kind = (
            name.replace("text_encoder", "tokenizer"),
            "CLIPTokenizer" if tokenizer.unk is None else "PreTrainedTokenizerFast",
        )
        tokenizer.save(folder / words)
        index |= {name: ["transformers", *configs[name]["architectures"]], words: ["transformers", kind]}
    _write_json(folder / "scheduler" / "scheduler_config.json", parts.scheduler.to_diffusers())
    _write_json(folder / "model_index.json", index)


def _index(parts: Parts) -> dict[str, Any]:
    """The model_index.json, with the parts that are absent; those that are there go over them."""
    family = family_of(parts.unet.config)
    kind = "Img2Img" if family == "sdxl-refiner" else "Inpaint" if parts.unet.config.in_channels == 9 else ""
    xl = family in ("sdxl", "sdxl-refiner")
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{'XL' if xl else ''}{kind}Pipeline",
        "_diffusers_version": "0.35.0",
        "_fewstep": {"name": parts.name, "licence": parts.licence, "defaults": asdict(parts.defaults)},
        "scheduler": ["diffusers", parts.scheduler.to_diffusers()["_class_name"]],
        "feature_extractor": _ABSENT,
        "image_encoder": _ABSENT,
    }
    if not xl:
        return index | {"safety_checker": _ABSENT, "requires_safety_checker": False}
    index |= {"text_encoder": _ABSENT, "tokenizer": _ABSENT}
    index["force_zeros_for_empty_prompt"] = parts.force_zeros_for_empty_prompt
    return index | ({"requires_aesthetics_score": parts.requires_aesthetics_score} if family == "sdxl-refiner" else {})


def _check_recognised(parts: Parts, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """That a reader of the single file will build the very same networks."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    read = recognise(TensorFile(path=path, shapes=shapes, dtypes={}, read=lambda name, _: tensors[name]))
    towers = tuple(tower.config for tower in parts.text_encoders)
    mine = Contents(family_of(parts.unet.config), parts.unet.config, parts.autoencoder.config, towers)
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
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
