"""Loading a model: by its name, from a diffusers folder, an original single file, or the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.diffusion.denoiser import Prediction
from fewstep.errors import CheckpointError, InputError, unknown
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import AutoencoderConfig, TextConfig, UNetConfig
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.tiny_autoencoder import TinyAutoencoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import Entry
from fewstep.text.tokenizer import Tokenizer
from fewstep.weights.build import Filling, built, fill, parsed
from fewstep.weights.fetch import located, parts_of, read_json, shards, weight_file
from fewstep.weights.files import TensorFile, joined, kind_of, read_safetensors
from fewstep.weights.layouts import diffusers_places
from fewstep.weights.parts import Parts, family_of, usual_defaults
from fewstep.weights.scheduler import PREDICTIONS, SchedulerConfig
from fewstep.weights.single import load_single_file
from fewstep.weights.unpickle import read_torch

CPU = torch.device("cpu")


def load_parts(
    what: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device = CPU,
    revision: str | None = None,
    prediction: str | None = None,
    tokenizer: Path | None = None,
) -> Parts:
    """All parts of a model, ready to run, in `dtype` on `device`.

    `what`: a name of the catalogue, a diffusers folder, an original single file (.safetensors, .ckpt), or a hub id;
    `revision` is the hub's. `prediction` ("epsilon", "v_prediction", "sample") overrules the checkpoint, and is
    needed where a single file does not say. `tokenizer`: a folder, for a single file. Raises CheckpointError for
    files that do not load, with nothing half loaded, and InputError for an unknown name.
    """
    if prediction is not None and prediction not in PREDICTIONS:
        raise InputError(unknown("prediction", prediction, PREDICTIONS))
    path, known = located(what, half=dtype.itemsize == 2, revision=revision)
    if path.is_dir():
        return _load_folder(path, known, dtype=dtype, device=device, prediction=prediction)
    return load_single_file(open_tensors(path), dtype=dtype, device=device, prediction=prediction, tokenizer=tokenizer)


def load_tiny(what: str | Path, *, dtype: torch.dtype, device: torch.device = CPU) -> TinyAutoencoder:
    """A tiny autoencoder by its name ("taesd"), folder or hub id; raises as `load_parts` does."""
    path, _ = located(what, half=dtype.itemsize == 2)
    if not path.is_dir() or (path / "model_index.json").is_file():
        raise InputError(f"{what} is not the folder of a tiny autoencoder; those are taesd and taesdxl")
    with torch.device("meta"):
        network = TinyAutoencoder()
    fill([_filling(path, network, dtype)], ignored=_ignored, dtype=dtype, device=device)
    return network


def open_tensors(path: Path) -> TensorFile:
    """The tensors of a file of weights, by what it holds and not by its name; CheckpointError for another file."""
    return read_torch(path) if kind_of(path) == "torch" else read_safetensors(path)


def _load_folder(
    folder: Path, known: Entry | None, *, dtype: torch.dtype, device: torch.device, prediction: Prediction | None
) -> Parts:
    """The parts of a diffusers folder."""
    index, notes = _index(folder)
    names = parts_of(index)
    scheduler = parsed(folder / "scheduler" / "scheduler_config.json", SchedulerConfig.from_diffusers)
    towers = [name for name in names if name.startswith("text_encoder")]
    tokenizers = [Tokenizer.from_folder(folder / name.replace("text_encoder", "tokenizer")) for name in towers]
    networks = {name: _network(folder / name / "config.json") for name in names}
    fillings = [_filling(folder / name, network, dtype) for name, network in networks.items()]
    fill(fillings, ignored=_ignored, dtype=dtype, device=device)
    unet, autoencoder = networks["unet"], networks["vae"]
    assert isinstance(unet, UNet)
    assert isinstance(autoencoder, AutoencoderKL)
    family, size = family_of(unet.config), _native_size(folder, autoencoder.config.factor)
    noted = notes.get("defaults")
    return Parts(
        name=known.name if known else str(notes.get("name", folder.name)),
        family=known.family if known else family,
        unet=unet,
        autoencoder=autoencoder,
        text_encoders=tuple(network for network in networks.values() if isinstance(network, TextEncoder)),
        tokenizers=tuple(tokenizers),
        scheduler=replace(scheduler, prediction=prediction or scheduler.prediction),
        defaults=usual_defaults(family, scheduler, size, noted=noted, known=known),
        licence=known.licence if known else str(notes.get("licence", "unknown")),
        force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", family == "sdxl")),
        requires_aesthetics_score=bool(index.get("requires_aesthetics_score", family == "sdxl-refiner")),
    )


def _index(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The folder's model_index.json and fewstep's notes in it; CheckpointError when the folder cannot draw."""
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} has no model_index.json, so it is not the diffusers folder of a whole model")
    index = read_json(folder / "model_index.json")
    names, notes = parts_of(index), index.get("_fewstep", {})
    lacking = [name for name in ("unet", "vae") if name not in names]
    if lacking or len(names) < 3:
        what = " and ".join(lacking) or "text_encoder"
        raise CheckpointError(f"{folder} is a {index.get('_class_name')} without {what}; fewstep draws from text")
    return index, notes if isinstance(notes, dict) else {}


def _network(path: Path) -> nn.Module:
    """The network that a part's config.json describes, on the meta device."""
    if path.parent.name == "unet":
        return built(UNet, parsed(path, UNetConfig.from_diffusers), path)
    if path.parent.name == "vae":
        return built(AutoencoderKL, parsed(path, AutoencoderConfig.from_diffusers), path)
    return built(TextEncoder, parsed(path, TextConfig.from_transformers), path)


def _filling(folder: Path, network: nn.Module, dtype: torch.dtype) -> Filling:
    chosen = weight_file((path.name for path in folder.glob("*")), half=dtype.itemsize == 2)
    if chosen is None:
        raise CheckpointError(f"{folder} has no file of weights (.safetensors or .bin); is the folder complete?")
    path = folder / chosen
    file = joined(path, map(open_tensors, shards(path))) if ".index." in chosen else open_tensors(path)
    return Filling(network, file, diffusers_places(network.state_dict(), file.shapes))


def _ignored(key: str) -> bool:
    """Text towers were published with the numbers 0 to 76 as if they were weights."""
    return key.endswith("embeddings.position_ids")


def _native_size(folder: Path, factor: int) -> tuple[int, int]:
    """Width and height in pixels of the pictures a UNet was trained on."""
    side = read_json(folder / "unet" / "config.json").get("sample_size") or 64
    height, width = side if isinstance(side, list) and len(side) == 2 else (side, side)
    return int(width) * factor, int(height) * factor
